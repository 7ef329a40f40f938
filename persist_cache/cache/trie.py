"""A radix trie of packed prompts in memory: the contract of mlx-lm's `PromptTrie`.

Prompts are `bytes` (`tokens.pack_tokens`, 8 per token), and edges hold whole runs of them, so
that a walk is a few memcmp calls: its cost grows with the prompt and with the number of
branches passed, not with the number of entries or of tokens stored below.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from msgspec import Struct

from persist_cache.tokens import TOKEN_BYTES, common_prefix_tokens

V = TypeVar("V")


class Stored(NamedTuple, Generic[V]):
    """A stored value and the length of its key."""

    num_tokens: int
    value: V


class TrieMatch(Struct, Generic[V], frozen=True):
    """What a trie knows about one prompt; every field is filled whatever the others say.

    Upstream's result, with the values in place of their keys and without its gaps: one-token
    prefixes count, and an exact hit still tells of its neighbours, because a cache that cannot
    be trimmed needs the next shorter one to leave a token to compute.

    Attributes:
        exact: The value stored under the prompt itself, or None.
        shorter: The longest stored strict prefix, perhaps the empty key, or None.
        longer: The shortest stored key that goes on from the `common_prefix`: it extends the
            prompt, or leaves it there. None when the two would share no token.
        longer_key: The key of `longer`, or None.
        common_prefix: Tokens the prompt shares with any stored key, with or without a value
            at that point.
    """

    exact: V | None = None
    shorter: Stored[V] | None = None
    longer: Stored[V] | None = None
    longer_key: bytes | None = None
    common_prefix: int = 0


class _Leaf(Struct, Generic[V], eq=False):
    """A key and its value, compared by identity. The key is the caller's object: no copy."""

    key: bytes
    value: V

    @property
    def num_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES

    def stored(self) -> Stored[V]:
        return Stored(self.num_tokens, self.value)


class _Node(Generic[V]):
    """The end of one edge.

    Invariant: a node other than a root has a leaf or at least two children, so that something
    is stored under every node and the number of nodes is at most twice the number of values.
    """

    __slots__ = ("below", "children", "edge", "leaf")

    def __init__(self, edge: bytes) -> None:
        self.edge = edge
        self.children: dict[bytes, _Node[V]] = {}
        self.leaf: _Leaf[V] | None = None
        # Shortest leaf strictly below, kept up to date by add and pop: without it, answering
        # `longer` would mean searching the whole subtree.
        self.below: _Leaf[V] | None = None

    @property
    def nearest(self) -> _Leaf[V] | None:
        return self.below if self.leaf is None else self.leaf

    def find_below(self) -> _Leaf[V] | None:
        leaves = (child.nearest for child in self.children.values())
        return min(
            (leaf for leaf in leaves if leaf is not None),
            key=lambda leaf: len(leaf.key),
            default=None,
        )


class PromptTrie(Generic[V]):
    """Values under (model, packed prompt).

    `model` is any hashable; each has a trie of its own. Values are not None, which stands for
    absent. `search`, `get` and `prefixes` change nothing.

    Thread safety: none. The caller holds its lock around every call.
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, _Node[V]] = {}
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[tuple[Hashable, bytes, V]]:
        """Yield (model, key, value), prefixes before the keys that extend them.

        The trie must not change meanwhile.
        """
        for model, root in self._roots.items():
            stack = [root]
            while stack:
                node = stack.pop()
                if node.leaf is not None:
                    yield model, node.leaf.key, node.leaf.value
                stack.extend(reversed(node.children.values()))

    def add(self, model: Hashable, key: bytes, value: V) -> V | None:
        """Store `value`, in place of the one that was there.

        Args:
            model: Identity of the model.
            key: Packed tokens. The object itself is kept.
            value: Anything but None.

        Returns:
            The value replaced, or None.

        Raises:
            ValueError: `key` is not a whole number of packed tokens, or `value` is None.
        """
        if len(key) % TOKEN_BYTES:
            raise ValueError(f"a key of {len(key)} bytes is not made of {TOKEN_BYTES}-byte tokens")
        if value is None:
            raise ValueError("a stored value cannot be None, which stands for absent")
        if model not in self._roots:
            self._roots[model] = _Node(b"")

        path, at = self._walk(model, key)
        node = path[-1]
        if at < len(key):
            node = self._branch(node, key, at, path)
        if node.leaf is not None:
            previous = node.leaf.value
            # Changed in place: `below` of every ancestor may refer to this leaf.
            node.leaf.value = value
            return previous
        node.leaf = leaf = _Leaf(key, value)
        self._len += 1
        for ancestor in reversed(path):
            if ancestor is node:
                continue
            if ancestor.below is not None and len(ancestor.below.key) <= len(key):
                # Its ancestors know that one, or a still shorter one.
                break
            ancestor.below = leaf
        return None

    def get(self, model: Hashable, key: bytes) -> V:
        """Return the value stored under exactly `key`.

        Raises:
            KeyError: there is none.
        """
        return self._path_to(model, key)[1].value

    def pop(self, model: Hashable, key: bytes) -> V:
        """Remove and return the value stored under exactly `key`.

        Nodes that nothing needs any more go with it. Takes longer, by the number of branches
        along the path, when the key is the shortest below them.

        Raises:
            KeyError: there is none; nothing changed.
        """
        path, leaf = self._path_to(model, key)
        node = path.pop()
        node.leaf = None
        self._len -= 1
        if not path:
            if not node.children:
                del self._roots[model]
            return leaf.value

        parent = path[-1]
        if not node.children:
            del parent.children[node.edge[:TOKEN_BYTES]]
            # The parent may have existed only to part the removed branch from another.
            if len(path) > 1:
                self._merge(path[-2], parent)
        else:
            self._merge(parent, node)
        for ancestor in reversed(path):
            if ancestor.below is not leaf:
                # Its ancestors knew a shorter one too.
                break
            ancestor.below = ancestor.find_below()
        root = path[0]
        if root.leaf is None and not root.children:
            del self._roots[model]
        return leaf.value

    def prefixes(self, model: Hashable, key: bytes) -> list[Stored[V]]:
        """Return what is stored under strict prefixes of `key`, shortest first.

        The empty key is a prefix of every other, with 0 tokens.
        """
        path, _ = self._walk(model, key)
        return [
            node.leaf.stored()
            for node in path
            if node.leaf is not None and len(node.leaf.key) < len(key)
        ]

    def search(self, model: Hashable, key: bytes) -> TrieMatch[V]:
        """Find what is stored under `key`, its prefixes and its extensions.

        Linear in `key`, however much is stored and wherever the walk ends.
        """
        path, at = self._walk(model, key)
        if not path:
            return TrieMatch()
        last = path[-1]
        common = at // TOKEN_BYTES
        whole = at == len(key)
        exact = last.leaf if whole else None
        above = path[:-1] if whole else path
        shorter = next((node.leaf for node in reversed(above) if node.leaf is not None), None)
        longer = last.below
        child = last.children.get(key[at : at + TOKEN_BYTES])
        if child is not None:
            # The walk ended inside this child's edge.
            common += common_prefix_tokens(child.edge, key[at : at + len(child.edge)])
            longer = child.nearest
        if common == 0:
            longer = None
        return TrieMatch(
            exact=None if exact is None else exact.value,
            shorter=None if shorter is None else shorter.stored(),
            longer=None if longer is None else longer.stored(),
            longer_key=None if longer is None else longer.key,
            common_prefix=common,
        )

    def _walk(self, model: Hashable, key: bytes) -> tuple[list[_Node[V]], int]:
        """Follow whole edges of `key`; return the nodes passed and the bytes they cover.

        The list starts with the root and is empty for an unknown model.
        """
        node = self._roots.get(model)
        if node is None:
            return [], 0
        path = [node]
        at = 0
        while at < len(key):
            child = node.children.get(key[at : at + TOKEN_BYTES])
            # startswith with an offset is a memcmp without a copy.
            if child is None or not key.startswith(child.edge, at):
                break
            at += len(child.edge)
            node = child
            path.append(node)
        return path, at

    def _path_to(self, model: Hashable, key: bytes) -> tuple[list[_Node[V]], _Leaf[V]]:
        path, at = self._walk(model, key)
        if not path or at != len(key) or path[-1].leaf is None:
            raise KeyError(f"no value for this key of {len(key) // TOKEN_BYTES} tokens")
        return path, path[-1].leaf

    @staticmethod
    def _branch(parent: _Node[V], key: bytes, at: int, path: list[_Node[V]]) -> _Node[V]:
        """Make the node for `key`, which leaves the tree below `parent` at byte `at`.

        Splits the edge that it leaves in the middle and appends the new node above to `path`.
        """
        first = key[at : at + TOKEN_BYTES]
        child = parent.children.get(first)
        if child is not None:
            piece = key[at : at + len(child.edge)]
            shared = common_prefix_tokens(child.edge, piece) * TOKEN_BYTES
            # The lower half keeps its identity and the upper half its place among siblings.
            upper: _Node[V] = _Node(child.edge[:shared])
            upper.below = child.nearest
            child.edge = child.edge[shared:]
            upper.children[child.edge[:TOKEN_BYTES]] = child
            parent.children[first] = upper
            path.append(upper)
            parent, at = upper, at + shared
            if at == len(key):
                return upper
        node: _Node[V] = _Node(key[at:])
        parent.children[node.edge[:TOKEN_BYTES]] = node
        return node

    @staticmethod
    def _merge(parent: _Node[V], node: _Node[V]) -> None:
        """Join `node` with its only child, if it has no value and just one."""
        if node.leaf is not None or len(node.children) != 1:
            return
        (child,) = node.children.values()
        child.edge = node.edge + child.edge
        parent.children[child.edge[:TOKEN_BYTES]] = child
