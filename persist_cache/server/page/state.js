// ---- what is known, and asking for it again ----
const POLL_MS = 3000, MOST_REST_MS = 30000, PAGE = 100, FIRST = 100, MOST_REQUESTS = 2000, HISTORY_MS = 15000, MOST_PREVIEWS = 3000;
const SOURCES = ["disk", "memory", "remote"];
const state = {
  token: "", stats: null, history: null, health: {}, requests: [], byId: new Map(), paused: false, seen: null,
  view: "tree", roots: null, open: new Map(), pages: new Map(), total: 0, sort: "used", most: null,
  previews: new Map(), epoch: 0, offset: 0, gone: 0, patience: 30000,
};
const now = () => Date.now() / 1000 + state.offset;

// The token comes from the link's fragment into this tab, and goes nowhere else.
const KEEP = "persist-cache-token";
function keepToken(token) {
  state.token = token;
  try { sessionStorage.setItem(KEEP, token); } catch { /* then it lasts until this page is loaded again */ }
}
function takeToken() {
  const given = /^#token=(.+)$/.exec(location.hash);
  if (!given) return false;
  // Neither the address bar nor the history is to show it.
  history.replaceState(null, "", location.pathname + location.search);
  try { keepToken(decodeURIComponent(given[1])); } catch { return false; }
  return true;
}
if (!takeToken()) try { state.token = sessionStorage.getItem(KEEP) || ""; } catch { /* storage is off */ }

let timer = 0, asking = false, ticking = false, historyAt = -Infinity;
async function tick(force) {
  clearTimeout(timer);
  if (ticking || asking || (!force && (state.paused || document.hidden))) return;
  ticking = true;
  const started = performance.now();
  try {
    state.stats = await call("GET", "/v1/cache/stats");
    state.offset = state.stats.time - Date.now() / 1000;
    await newRequests();
    if (force || started - historyAt > HISTORY_MS) { await refreshHistory(); historyAt = started; }
    if (force || state.stats.version !== state.seen) {
      await refresh();
      state.seen = state.stats.version;
    }
    await render();
    state.gone = 0;
    $("main").classList.remove("stale");
    if (!$("alert").dataset.act) $("alert").hidden = true;
    setText($("state"), state.paused ? "paused" : `updated ${clock(now())}`);
  } catch (error) {
    if (error.status === 401) { ticking = false; return askToken(); }
    if (!error.status) { state.gone ||= Date.now() / 1000; $("main").classList.add("stale"); }
    warn(error.status ? error.message : `The server cannot be reached since ${clock(state.gone)}; what is shown is from before. Trying again.`);
    setText($("state"), "not up to date");
  }
  ticking = false;
  timer = setTimeout(tick, state.gone ? POLL_MS : rest(performance.now() - started));
}
// A store that is slow to list is asked less often; one answer that took long says little of the next.
const rest = spent => Math.min(MOST_REST_MS, Math.max(POLL_MS, 10 * spent));
let quiet = 0;
function warn(text, ofAct) {
  const box = $("alert");
  setText(box, text);
  if (ofAct) box.dataset.act = "1"; else delete box.dataset.act;
  box.hidden = false;
}
function tell(text) {
  setText($("done"), text);
  $("done").hidden = false;
  clearTimeout(quiet);
  quiet = setTimeout(() => { $("done").hidden = true; }, 6000);
}

async function refreshHistory() {
  const [history, health] = await Promise.all([call("GET", "/v1/cache/history"), fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(state.patience) }).then(one => one.json()).catch(() => ({}))]);
  state.history = history;
  state.health = health;
}

// ---- requests: only those that are new; the older ones piece by piece ----
async function newRequests() {
  const last = state.requests[state.requests.length - 1];
  let fresh;
  // The last known one comes again: numbers begin anew when the server is started again.
  try { fresh = await call("GET", `/v1/cache/requests?limit=${last ? MOST_REQUESTS : FIRST}&after=${last ? last.number - 1 : 0}`); }
  catch (error) { if (error.status !== 409) throw error; return; }
  fresh.reverse();
  if (last) {
    const same = fresh.shift();
    if (!same || same.id !== last.id) { addRequests([]); state.epoch++; return newRequests(); }
  }
  if (fresh.length) state.epoch++;
  addRequests(state.requests.concat(fresh));
  if (!last && fresh.length === FIRST) olderRequests();
}
async function olderRequests() {
  try {
    while (state.requests.length && state.requests[0].number > 1 && state.requests.length < MOST_REQUESTS) {
      const oldest = state.requests[0];
      const older = await call("GET", `/v1/cache/requests?limit=${FIRST}&before=${oldest.number}`);
      if (!older.length || state.requests[0] !== oldest) return;
      addRequests(older.reverse().concat(state.requests));
      renderRequests();
    }
  } catch { /* the next tick says what is wrong */ }
}
function addRequests(all) {
  state.requests = all.slice(-MOST_REQUESTS);
  state.byId = new Map(state.requests.map(one => [one.id, one]));
}

// ---- entries ----
async function refresh() {
  state.epoch++;
  if (!state.stats.store) { state.roots = null; state.pages.clear(); state.most = null; return; }
  const most = call("GET", "/v1/cache/tree?sort=size&limit=1");
  if (state.view === "list") {
    const [start, end] = promptRows.range();
    const pages = [...new Set([0, start, Math.max(0, end - 1)].map(row => Math.floor(row / PAGE)))];
    const found = await Promise.all(pages.map(page => listPage(page)));
    state.pages = new Map(found.map((one, place) => [pages[place], one.entries]));
    state.total = found[0].total;
  } else {
    state.roots = await level(null, state.roots ? state.roots.branches.length : 0);
    await Promise.all([...state.open.keys()].map(async id => {
      try { state.open.set(id, await level(id, state.open.get(id).branches.length)); }
      catch (error) { if (error.status !== 404) throw error; state.open.delete(id); }
    }));
  }
  state.most = (await most).branches[0] || null;
}
function listPage(page) {
  const query = new URLSearchParams({ sort: state.sort, offset: page * PAGE, limit: PAGE });
  if ($("f-tier").value) query.set("tier", $("f-tier").value);
  if ($("f-label").value) query.set("label", `*${$("f-label").value}*`);
  if ($("f-model").value) query.set("model", $("f-model").value);
  if ($("f-pinned").checked) query.set("pinned", "true");
  return call("GET", `/v1/cache/entries?${query}`);
}
async function level(id, shown) {
  const query = new URLSearchParams({ limit: Math.min(1000, Math.max(PAGE, shown)), sort: treeSort() });
  if (id) query.set("branch", id);
  return call("GET", `/v1/cache/tree?${query}`);
}
const treeSort = () => state.sort === "size" ? "size" : "used";
async function moreOf(id) {
  const known = id ? state.open.get(id) : state.roots;
  const query = new URLSearchParams({ limit: PAGE, offset: known.branches.length, sort: treeSort() });
  if (id) query.set("branch", id);
  known.branches.push(...(await call("GET", `/v1/cache/tree?${query}`)).branches);
  renderEntries();
}

// ---- previews: of the rows in sight alone ----
let previewing = 0;
function wantPreviews(ids) {
  clearTimeout(previewing);
  previewing = setTimeout(async () => {
    const wanted = [...new Set(ids)].filter(id => { const known = state.previews.get(id); return !known || known.epoch !== state.epoch; }).slice(0, PAGE);
    if (!wanted.length) return;
    const epoch = state.epoch;
    try {
      const found = await call("GET", `/v1/cache/previews?ids=${wanted.join(",")}`);
      for (const id of wanted) {
        const one = found.previews[id], before = state.previews.get(id);
        const same = before && one && before.text === one.text && before.client === one.client && before.turns === one.turns;
        state.previews.set(id, { ...one, epoch, version: same ? before.version : epoch });
      }
      while (state.previews.size > MOST_PREVIEWS) state.previews.delete(state.previews.keys().next().value);
      setText($("entries-note"), found.notes.join(" "));
      renderEntries();
      renderMost();
    } catch { /* the next tick says what is wrong */ }
  }, 60);
}
const preview = id => state.previews.get(id) || {};
function titleOf(one, id, labels) {
  const label = labels && labels.length ? labels.join(", ") : one.label;
  if (label) return label;
  const text = preview(id || one.id).text;
  return text || `${one.tier} ${one.short_id || one.id.slice(0, 6)}`;
}
