// ---- stored prompts: as a tree of conversations, or as a list ----
let promptRows, idsInSight = [];
const HEADS = [["prompt"], ["last client", "client"], ["turns", "num"], ["tokens", "num"], ["size", "num"], ["hits", "num"], ["saved", "num"], ["used", "num"], [""]];
let flat = [];

function startPrompts() {
  put($("entries-head"), HEADS.map(([text, kind]) => h("span", { class: kind || "" }, text)));
  promptRows = new Rows($("entries"), "Stored prompts", {
    get length() { return state.view === "tree" ? flat.length : state.total; },
    key: i => state.view === "tree" ? flat[i].key : `${(listed(i) || { id: `at-${i}` }).id}`,
    has: key => state.view === "tree" ? flat.some(one => one.key === key) : [...state.pages.values()].some(page => page.some(one => one.id === key)),
    version: i => versionOf(i),
    make: i => state.view === "tree" ? treeRow(flat[i]) : listRow(listed(i)),
    drawn: (start, end) => inSight(start, end),
  });
  $("entries").addEventListener("keydown", unfold);
}
const listed = i => { const page = state.pages.get(Math.floor(i / PAGE)); return page ? page[i % PAGE] : undefined; };
const previewVersion = (...ids) => ids.map(id => preview(id).version || 0).join(".");
function versionOf(i) {
  if (state.view === "list") { const one = listed(i); return one ? `${one.pinned}|${one.label}|${one.own_bytes}|${one.hits}|${one.saved_s}|${one.last_use}|${previewVersion(one.id)}` : "none"; }
  const { data, open, kind } = flat[i];
  if (kind === "more") return `${data}`;
  if (kind === "entry") return `${data.pinned}|${data.label}|${data.added_bytes}|${data.hits}|${data.last_use}|${previewVersion(data.id)}`;
  return `${open}|${data.last}|${data.last_pinned}|${data.labels}|${data.num_entries}|${data.num_branches}|${JSON.stringify(data.below)}|${previewVersion(data.id, data.last)}`;
}
function inSight(start, end) {
  const ids = [];
  for (let i = start; i < end; i++) {
    if (state.view === "list") {
      const one = listed(i);
      if (one) ids.push(one.id); else needPage(Math.floor(i / PAGE));
    } else if (flat[i].kind === "more") { if (!flat[i].asked) { flat[i].asked = true; act(() => moreOf(flat[i] ? flat[i].of : null)); } }
    else if (flat[i].kind === "entry") ids.push(flat[i].data.id);
    else ids.push(flat[i].data.id, flat[i].data.last);
  }
  idsInSight = ids;
  if (ids.some(id => preview(id).epoch !== state.epoch)) wantPreviews(ids);
}
const needed = new Set();
function needPage(page) {
  if (needed.has(page)) return;
  needed.add(page);
  listPage(page).then(found => { state.pages.set(page, found.entries); state.total = found.total; renderEntries(); }, () => {}).finally(() => needed.delete(page));
}

function renderEntries() {
  const store = state.stats && state.stats.store, box = $("entries");
  for (const one of document.querySelectorAll(".of-list")) one.hidden = state.view !== "list";
  for (const one of $("f-sort").options) one.disabled = state.view === "tree" && !["used", "size"].includes(one.value);
  if (state.view === "tree") $("f-sort").value = treeSort();
  $("as-tree").setAttribute("aria-pressed", String(state.view === "tree"));
  $("as-list").setAttribute("aria-pressed", String(state.view === "list"));
  setText($("count"), store ? plural(store.entries, "entry", "entries") : "");
  flat = store && state.view === "tree" && state.roots ? flatten() : [];
  let none = "";
  if (!store) none = `Nothing is kept on disk: ${(state.stats.server.disk_off || "there is no store").replace(/\.$/, "")}.`;
  else if (!store.entries) none = "The store is empty. It fills behind the first answers; any of these fills it:";
  else if (state.view === "list" && state.pages.size && !state.total) none = "Nothing matches.";
  const before = box.querySelector(".empty");
  if (before && before.dataset.why !== none) before.remove();
  $("entries-head").classList.toggle("gone", Boolean(none));
  if (none) {
    promptRows.clear();
    promptRows.list.style.height = "0";
    if (!box.querySelector(".empty")) box.prepend(h("div", { class: "empty", "data-why": none }, h("p", { class: "soft" }, said(none)), store && !store.entries ? filling() : null));
    return;
  }
  promptRows.draw();
}
function filling() {
  const model = state.stats.model || "MODEL";
  return [
    `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Hello"}]}'`,
    `persist-cache warm --model ${/^[\w@%+=:,./-]+$/.test(model) ? model : "MODEL"} --system @prompt.txt`,
    "persist-cache launch claude",
  ].map(line => copyable(line));
}

// ---- the tree, as rows ----
function flatten() {
  const rows = [];
  const add = (data, depth) => {
    const inside = state.open.get(data.id);
    rows.push({ kind: "branch", key: `b-${data.id}`, data, depth, open: Boolean(inside) });
    if (!inside) return;
    if (data.num_entries > 1) for (const one of inside.entries) rows.push({ kind: "entry", key: `e-${one.id}`, data: one, depth: depth + 1 });
    for (const one of inside.branches) add(one, depth + 1);
    more(data.id, inside, depth + 1);
  };
  const more = (id, level, depth) => {
    const left = level.total - level.branches.length;
    if (left > 0) rows.push({ kind: "more", key: `m-${id}-${level.branches.length}`, data: left, of: id, depth });
  };
  for (const one of state.roots.branches) add(one, 0);
  more(null, state.roots, 0);
  return rows;
}
const number = (label, text, extra) => h("span", { class: `num ${extra || ""}` }, h("span", {}, `${label} `), text);
function indent(row, depth) {
  // As deep as there is room for: a conversation may branch at each turn.
  row.querySelector(".name").style.paddingLeft = `${Math.min(depth, 8) * 1.1}rem`;
  return row;
}
function nameCell(tier, toggle, title, key, open, label, tags) {
  return h("span", { class: `name ${tier}` }, toggle, h("span", { class: "dot", title: tier }), 
    button(key, label ? h("b", {}, said(title)) : said(title), open, { class: "title cut", title: String(title).slice(0, 300), "aria-label": `${tier}: ${String(title).slice(0, 200)}` }), tags);
}
const clientCell = name => h("span", { class: "client soft cut", title: name || null }, said(name || ""));
function treeRow(row) {
  const { kind, data, depth } = row;
  if (kind === "more") return indent(h("div", { class: "row" }, h("span", { class: "name" }, button(row.key, `Show more of ${whole(data)}`, () => act(() => moreOf(row.of)), { class: "title plain" }))), depth);
  if (kind === "entry") return indent(entryRow(data, data.added_bytes, h("span", { class: "toggle none" })), depth);
  const one = data, expandable = one.num_entries > 1 || one.num_branches > 0;
  const title = titleOf(one, one.id, one.labels);
  const toggle = h("button", {
    type: "button", "data-key": `t-${one.id}`, class: expandable ? "toggle" : "toggle none", disabled: !expandable,
    "aria-expanded": expandable ? String(row.open) : null, "aria-label": `${row.open ? "Close" : "Open"} ${String(title).slice(0, 200)}`,
    on: { click: () => act(() => toggleBranch(one.id)) },
  }, row.open ? "▾" : "▸");
  const several = state.stats.store.models.length > 1 && one.parent === null;
  return indent(h("div", { class: "row" },
    nameCell(one.tier, toggle, title, `d-${one.id}`, () => act(() => details(one.id)), one.labels.length, [
      one.below.entries > 1 ? h("span", { class: "tag" }, plural(one.below.entries, "entry", "entries")) : null,
      several ? h("span", { class: "tag cut" }, said(one.model_name)) : null,
      // One pin of its own is what the button says already.
      one.below.pinned > Number(one.last_pinned) ? h("span", { class: "tag" }, one.below.pinned > 1 ? `${one.below.pinned} pinned` : "pinned") : null]),
    clientCell(preview(one.last).client || preview(one.id).client),
    numbers(preview(one.last).turns, one.last_tokens, one.below.bytes, one.below.hits, one.below.saved_s, one.below.last_use),
    rowActs(one.last, title, one.last_pinned, () => evict(one.id, one.below.entries > 1))), depth);
}
function entryRow(one, size, toggle) {
  const title = titleOf(one);
  return h("div", { class: "row" },
    nameCell(one.tier, toggle, title, `d-${one.id}`, () => act(() => details(one.id)), one.label, one.pinned ? [h("span", { class: "tag" }, "pinned")] : []),
    clientCell(preview(one.id).client),
    numbers(preview(one.id).turns, one.num_tokens, size, one.hits, one.saved_s, one.last_use),
    rowActs(one.id, title, one.pinned, () => evict(one.id, false)));
}
const listRow = one => one ? entryRow(one, one.own_bytes, null) : h("div", { class: "row soft" }, h("span", { class: "name" }, "…"));
const numbers = (turns, tokens, size, hits, saved, then) => [
  number("turns", turns ? whole(turns) : "", "wide"), number("tokens", whole(tokens)), number("size", bytes(size)), number("hits", whole(hits), "wide"),
  number("saved", duration(saved), "wide"), number("used", h("time", { "data-then": then }, age(then)), "used")];
const rowActs = (id, name, pinned, remove) => h("span", { class: "acts" },
  button(`p-${id}`, pinned ? "Unpin" : "Pin", () => act(() => pin(id, !pinned)), { "aria-label": `${pinned ? "Unpin" : "Pin"} ${String(name).slice(0, 200)}` }),
  button(`x-${id}`, "Evict", () => act(remove), { "aria-label": `Evict ${String(name).slice(0, 200)}` }));
function renderAges() { for (const one of document.querySelectorAll("time[data-then]")) setText(one, age(Number(one.dataset.then))); }

async function toggleBranch(id) {
  if (state.open.has(id)) state.open.delete(id);
  else state.open.set(id, await level(id, 0));
  renderEntries();
}
function unfold(event) {
  if (!["ArrowRight", "ArrowLeft"].includes(event.key) || state.view !== "tree") return;
  const item = event.target.closest("li");
  const i = item ? Number(item.getAttribute("aria-posinset")) - 1 : -1, row = flat[i];
  if (!row) return;
  event.preventDefault();
  const opens = event.key === "ArrowRight";
  const expandable = row.kind === "branch" && (row.data.num_entries > 1 || row.data.num_branches > 0);
  if (expandable && row.open !== opens) return void act(() => toggleBranch(row.data.id));
  if (opens) return;
  for (let above = i - 1; above >= 0; above--) if (flat[above].depth < row.depth) return promptRows.focus(above);
}
function look(view) { state.view = view; $("entries").scrollTop = promptRows.top = 0; promptRows.clear(); state.pages.clear(); return act(async () => { await refresh(); await render(); }); }
function sortBy(key) { state.sort = $("f-sort").value = key; return look(state.view); }
