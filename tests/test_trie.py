from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import SupportsIndex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import persist_cache.cache.trie
from persist_cache.cache.trie import PromptTrie, TrieMatch
from persist_cache.tokens import TOKEN_BYTES, common_prefix_tokens, pack_tokens
from tests import forge
from tests.examples import examples

MODEL = ("model", None, None)


class NaiveTrie:
    """The same contract by brute force over a dict."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[int, ...]], int] = {}

    def of(self, model: str) -> dict[tuple[int, ...], int]:
        return {tokens: value for (name, tokens), value in self.values.items() if name == model}

    def prefixes(self, model: str, prompt: tuple[int, ...]) -> list[tuple[int, int]]:
        return sorted(
            (len(tokens), value)
            for tokens, value in self.of(model).items()
            if len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens
        )

    def common_prefix(self, model: str, prompt: tuple[int, ...]) -> int:
        return max((_common(prompt, tokens) for tokens in self.of(model)), default=0)

    def longer(self, model: str, prompt: tuple[int, ...]) -> int | None:
        """Length of the shortest key that goes on from the common prefix."""
        common = self.common_prefix(model, prompt)
        return min(
            (
                len(tokens)
                for tokens in self.of(model)
                if len(tokens) > common and _common(prompt, tokens) == common > 0
            ),
            default=None,
        )


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def check_structure(trie: PromptTrie[int]) -> None:
    """Assert that no node is left over and that every shortcut points to a shortest leaf."""
    num_values = 0
    for root in forge.roots(trie).values():
        assert root.leaf is not None or root.children
        stack = [(root, b"")]
        while stack:
            node, above = stack.pop()
            path = above + node.edge
            if node is not root:
                assert node.edge
                assert node.leaf is not None or len(node.children) >= 2
            if node.leaf is not None:
                assert node.leaf.key == path
                num_values += 1
            nearest = [child.nearest for child in node.children.values()]
            assert all(leaf is not None for leaf in nearest)
            if nearest:
                # By identity, not only by length: pop relies on it.
                assert any(node.below is leaf for leaf in nearest)
                assert node.below is not None
                assert len(node.below.key) == min(len(leaf.key) for leaf in nearest if leaf)
            else:
                assert node.below is None
            for first, child in node.children.items():
                assert child.edge.startswith(first)
                assert len(first) == TOKEN_BYTES
                stack.append((child, path))
    assert num_values == len(trie)


# Few distinct tokens, so that prompts collide; image ids of mlx-lm are 60-bit negatives.
TOKENS = st.sampled_from([0, 1, 2, -(2**59) - 1, -(2**59) - 2, 2**62])
PROMPTS = st.lists(TOKENS, max_size=7).map(tuple)
MODELS = st.sampled_from(["a", "b"])
# "pop" takes the nth key that is stored; random ones would nearly always be absent.
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "pop", "pop any"]), MODELS, PROMPTS, st.integers(0)),
    max_size=40,
)


@settings(deadline=None, max_examples=examples(60, 300))
@given(OPERATIONS, st.lists(st.tuples(MODELS, PROMPTS), min_size=1, max_size=5))
def test_behaves_like_a_dict_searched_by_brute_force(
    operations: list[tuple[str, str, tuple[int, ...], int]],
    queries: list[tuple[str, tuple[int, ...]]],
) -> None:
    trie: PromptTrie[int] = PromptTrie()
    naive = NaiveTrie()

    for value, (operation, model, tokens, nth) in enumerate(operations):
        if operation == "pop" and naive.values:
            model, tokens = list(naive.values)[nth % len(naive.values)]
        key = pack_tokens(tokens)
        if operation == "add":
            assert trie.add(model, key, value) == naive.values.get((model, tokens))
            naive.values[model, tokens] = value
        elif (model, tokens) in naive.values:
            assert trie.pop(model, key) == naive.values.pop((model, tokens))
        else:
            with pytest.raises(KeyError):
                trie.pop(model, key)
        check_structure(trie)

    assert len(trie) == len(naive.values)
    assert {(model, key): value for model, key, value in trie} == {
        (model, pack_tokens(tokens)): value for (model, tokens), value in naive.values.items()
    }
    for model, tokens in [*queries, *naive.values]:
        assert_search_agrees(trie, naive, model, tokens)


def assert_search_agrees(
    trie: PromptTrie[int], naive: NaiveTrie, model: str, tokens: tuple[int, ...]
) -> None:
    key = pack_tokens(tokens)
    prefixes = naive.prefixes(model, tokens)
    match = trie.search(model, key)
    exact = naive.values.get((model, tokens))
    assert match.exact == exact
    if exact is None:
        with pytest.raises(KeyError):
            trie.get(model, key)
    else:
        assert trie.get(model, key) == exact
    assert trie.prefixes(model, key) == prefixes
    assert match.shorter == (prefixes[-1] if prefixes else None)
    assert match.common_prefix == naive.common_prefix(model, tokens)
    num_longer = naive.longer(model, tokens)
    if num_longer is None:
        assert match.longer is None
        assert match.longer_key is None
    else:
        assert match.longer is not None
        assert match.longer_key is not None
        assert match.longer.num_tokens == num_longer == len(match.longer_key) // TOKEN_BYTES
        assert common_prefix_tokens(match.longer_key, key) == match.common_prefix
        assert trie.get(model, match.longer_key) == match.longer.value


@settings(deadline=None)
@given(st.lists(PROMPTS, max_size=20, unique=True), st.randoms())
def test_popping_everything_leaves_nothing_behind(
    prompts: list[tuple[int, ...]], random: object
) -> None:
    trie: PromptTrie[int] = PromptTrie()
    for value, tokens in enumerate(prompts):
        trie.add(MODEL, pack_tokens(tokens), value)

    random.shuffle(prompts)  # type: ignore[attr-defined]
    for tokens in prompts:
        trie.pop(MODEL, pack_tokens(tokens))
        check_structure(trie)

    assert len(trie) == 0
    assert forge.roots(trie) == {}


def test_unknown_model_is_a_miss() -> None:
    trie: PromptTrie[str] = PromptTrie()
    trie.add("other", pack_tokens([1]), "value")

    assert trie.search(MODEL, pack_tokens([1])) == TrieMatch()
    assert trie.prefixes(MODEL, pack_tokens([1])) == []
    with pytest.raises(KeyError):
        trie.get(MODEL, pack_tokens([1]))
    with pytest.raises(KeyError):
        trie.pop(MODEL, pack_tokens([1]))


def test_one_token_prefix_is_found() -> None:
    # Upstream loses it: `last_index > 0`.
    trie: PromptTrie[str] = PromptTrie()
    trie.add(MODEL, pack_tokens([7]), "one")

    assert trie.search(MODEL, pack_tokens([7, 8])).shorter == (1, "one")
    assert trie.search(MODEL, pack_tokens([7])).exact == "one"


def test_empty_key_is_a_prefix_of_everything() -> None:
    trie: PromptTrie[str] = PromptTrie()
    trie.add(MODEL, b"", "root")

    assert trie.search(MODEL, b"") == TrieMatch(exact="root")
    assert trie.search(MODEL, pack_tokens([1])) == TrieMatch(shorter=(0, "root"))  # type: ignore[arg-type]
    assert trie.prefixes(MODEL, pack_tokens([1])) == [(0, "root")]
    assert trie.prefixes(MODEL, b"") == []
    assert trie.pop(MODEL, b"") == "root"


def test_keys_without_a_common_token_are_not_longer() -> None:
    trie: PromptTrie[str] = PromptTrie()
    trie.add(MODEL, pack_tokens([1, 2]), "value")

    assert trie.search(MODEL, b"").longer is None
    assert trie.search(MODEL, pack_tokens([2])).longer is None


def test_walk_that_ends_in_a_branch_without_values_is_answered() -> None:
    # Upstream raises TypeError once pop_prefixes has emptied such a branch.
    trie: PromptTrie[str] = PromptTrie()
    trie.add(MODEL, pack_tokens([1, 2]), "short")
    trie.add(MODEL, pack_tokens([1, 2, 3]), "long")
    trie.pop(MODEL, pack_tokens([1, 2, 3]))
    trie.add(MODEL, pack_tokens([9]), "other")
    trie.pop(MODEL, pack_tokens([1, 2]))

    assert trie.search(MODEL, pack_tokens([1, 2, 4])) == TrieMatch()


def test_exact_hit_tells_of_its_neighbours() -> None:
    trie: PromptTrie[str] = PromptTrie()
    for tokens in ([1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]):
        trie.add(MODEL, pack_tokens(tokens), str(len(tokens)))

    match = trie.search(MODEL, pack_tokens([1, 2, 3, 4]))

    assert match.exact == "4"
    assert match.shorter == (2, "2")
    assert match.longer == (5, "5")
    assert match.longer_key == pack_tokens([1, 2, 3, 4, 7])
    assert match.common_prefix == 4


def test_longer_is_the_shortest_that_goes_on() -> None:
    trie: PromptTrie[str] = PromptTrie()
    for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 8], [1, 2, 3, 7]):
        trie.add(MODEL, pack_tokens(tokens), str(len(tokens)))

    assert trie.search(MODEL, pack_tokens([1])).longer == (3, "3")
    assert trie.search(MODEL, pack_tokens([1, 2, 9])).longer == (3, "3")
    assert trie.search(MODEL, pack_tokens([1, 2, 3, 4, 9])).longer == (6, "6")
    trie.add(MODEL, pack_tokens([1, 2, 9, 9, 9]), "5")
    trie.pop(MODEL, pack_tokens([1, 2, 8]))
    assert trie.search(MODEL, pack_tokens([1, 2, 0])).longer == (4, "4")


def test_tokens_that_share_bytes_are_not_mistaken_for_each_other() -> None:
    # Little-endian 0x0100 and 0x0001 share byte patterns across a token boundary.
    trie: PromptTrie[str] = PromptTrie()
    trie.add(MODEL, pack_tokens([256, 1]), "value")

    assert trie.search(MODEL, pack_tokens([0, 1])).common_prefix == 0
    assert trie.search(MODEL, pack_tokens([256, 257])).common_prefix == 1


def test_refused_add_changes_nothing() -> None:
    trie: PromptTrie[str | None] = PromptTrie()

    with pytest.raises(ValueError, match="8-byte tokens"):
        trie.add(MODEL, b"12345", "value")
    with pytest.raises(ValueError, match="None"):
        trie.add(MODEL, pack_tokens([1]), None)

    assert len(trie) == 0
    assert forge.roots(trie) == {}


def test_hundred_thousand_tokens() -> None:
    trie: PromptTrie[str] = PromptTrie()
    tokens = list(range(100_000))
    trie.add(MODEL, pack_tokens(tokens), "whole")
    trie.add(MODEL, pack_tokens(tokens[:60_000]), "part")

    match = trie.search(MODEL, pack_tokens([*tokens[:99_999], -1]))

    assert match.common_prefix == 99_999
    assert match.shorter == (60_000, "part")
    assert match.longer == (100_000, "whole")
    trie.pop(MODEL, pack_tokens(tokens[:60_000]))
    (child,) = forge.roots(trie)[MODEL].children.values()
    assert len(child.edge) == 100_000 * TOKEN_BYTES


def test_conversation_of_many_turns_needs_no_recursion() -> None:
    trie: PromptTrie[int] = PromptTrie()
    key = pack_tokens(range(2_000))
    for end in range(1, 2_001):
        trie.add(MODEL, key[: end * TOKEN_BYTES], end)

    assert len(trie.prefixes(MODEL, key)) == 1_999
    assert [value for _, _, value in trie] == list(range(1, 2_001))


class Meter:
    """Counts the bytes that a walk reads and the nodes that it tries."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.nodes = 0


class MeteredKey(bytes):
    """A key that reports to `meter` what is compared with it or copied out of it."""

    meter: Meter

    def startswith(  # type: ignore[override]
        self, prefix: bytes, start: SupportsIndex | None = None, /
    ) -> bool:
        self.meter.nodes += 1
        self.meter.nbytes += min(len(prefix), len(self) - int(start or 0))
        return super().startswith(prefix, start)

    def __getitem__(self, index: slice) -> bytes:  # type: ignore[override]
        piece = super().__getitem__(index)
        self.meter.nbytes += len(piece)
        return piece


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[PromptTrie[int], list[int]], Meter]:
    def search(trie: PromptTrie[int], tokens: list[int]) -> Meter:
        meter = Meter()

        def counted(a: bytes, b: bytes) -> int:
            # The bisection halves: twice the shorter operand bounds what it compares.
            meter.nbytes += 2 * min(len(a), len(b))
            return common_prefix_tokens(a, b)

        key = MeteredKey(pack_tokens(tokens))
        key.meter = meter
        with monkeypatch.context() as patch:
            patch.setattr(persist_cache.cache.trie, "common_prefix_tokens", counted)
            trie.search(MODEL, key)
        return meter

    return search


SYSTEM = list(range(10_000))


def with_common_system(num_entries: int) -> PromptTrie[int]:
    trie: PromptTrie[int] = PromptTrie()
    system = pack_tokens(SYSTEM)
    for entry in range(num_entries):
        trie.add(MODEL, system + pack_tokens([-entry, *range(100)]), entry)
    return trie


def test_thousand_entries_with_one_common_prefix() -> None:
    trie = with_common_system(1_000)

    match = trie.search(MODEL, pack_tokens([*SYSTEM, -500, 0, 1, 77]))

    assert match.common_prefix == 10_003
    assert match.longer == (10_101, 500)
    assert trie.search(MODEL, pack_tokens(SYSTEM)).common_prefix == 10_000
    # The common prefix is kept once: the root, it, and one node per entry.
    (common,) = forge.roots(trie)[MODEL].children.values()
    assert common.edge == pack_tokens(SYSTEM)
    assert len(common.children) == 1_000
    check_structure(trie)


@pytest.mark.parametrize(
    "prompt",
    [
        [*SYSTEM, -1, *range(100)],
        [*SYSTEM, -1, *range(50), 999],
        SYSTEM,
        SYSTEM[:5_000],
        [*SYSTEM[:5_000], -1],
    ],
    ids=["exact", "leaves-a-reply", "ends-at-the-branch", "ends-in-an-edge", "leaves-an-edge"],
)
def test_work_of_a_search_does_not_grow_with_entries(
    measure: Callable[[PromptTrie[int], list[int]], Meter], prompt: list[int]
) -> None:
    few = measure(with_common_system(10), prompt)
    many = measure(with_common_system(1_000), prompt)

    assert (many.nodes, many.nbytes) == (few.nodes, few.nbytes)


def test_work_of_a_search_is_linear_in_the_prompt(
    measure: Callable[[PromptTrie[int], list[int]], Meter],
) -> None:
    # The worst tree for a walk: a value, and so a node, every ten tokens.
    tokens = list(range(10_000))
    key = pack_tokens(tokens)
    trie: PromptTrie[int] = PromptTrie()
    for end in range(10, 10_001, 10):
        trie.add(MODEL, key[: end * TOKEN_BYTES], end)

    for n in (1_005, 2_005, 4_005, 8_005):
        meter = measure(trie, [*tokens[:n], -1])

        assert meter.nodes == n // 10 + 1
        # Each byte once, the first token of every edge once more, the last edge four times.
        edge = 10 * TOKEN_BYTES
        assert meter.nbytes <= n * TOKEN_BYTES + (meter.nodes + 1) * TOKEN_BYTES + 4 * edge
