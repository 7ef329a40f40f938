// ---- at a glance: the latest request, the last day, the disk, what takes most of it ----
const body = id => $(id).querySelector(".body");
const windowOf = name => state.history ? state.history.windows.find(one => one.window === name) : null;
const reusedOf = one => sum(Object.values(one.tokens_reused));

function renderGlance() {
  const { healthy, model, model_state, store } = state.stats;
  const states = { loading: "the model is loading; requests wait for it", none: "no model is loaded", failed: "the generation thread died" };
  const { weights, warming } = state.health, name = model ? model.split("/").filter(Boolean).pop() : "";
  const doing = [
    !healthy ? states.failed : weights === "unloaded" ? "unloaded; the next request loads it" : model_state === "ready" ? "" : states[model_state] || model_state,
    warming && warming.state === "running" ? `warming: ${whole(warming.done)} of ${plural(warming.total, "prompt")} done` : "",
    warming && warming.failed.length ? `not warmed: ${warming.failed.join(" ")}` : "",
  ];
  setText($("model"), [name, ...doing].filter(Boolean).join(" – "));
  $("model").title = model || "";
  renderLatest();
  renderSaved();
  renderDiskCard(store);
  renderMost();
  renderRemote();
}
function renderLatest() {
  const one = state.requests[state.requests.length - 1];
  if (!one) return put(body("card-last"), h("p", { class: "big" }, "–"), h("p", { class: "soft" }, "No request yet."));
  put(body("card-last"),
    h("p", { class: "big" }, one.first_token_s === null ? stateWord(one) : `${duration(one.first_token_s)}`, h("span", { class: "soft" }, one.first_token_s === null ? "" : " to the first token")),
    h("p", {}, storyOf(one)),
    h("p", {}, button("last", "Why", () => act(() => requestDetails(one.id)), { class: "plain", "data-id": one.id, "aria-label": "Why: the latest request" }), h("span", { class: "soft" }, ` at ${clock(one.time)}`)));
}
function renderSaved() {
  const day = windowOf("day");
  if (!day) return put(body("card-saved"), h("p", { class: "big" }, "–"));
  const reused = reusedOf(day);
  put(body("card-saved"),
    h("p", { class: "big" }, day.saved_s ? `${duration(day.saved_s)} saved` : day.requests ? "Nothing saved" : "–"),
    h("p", {}, day.tokens_asked ? `${whole(reused)} of ${whole(day.tokens_asked)} prompt tokens were reused (${percent(reused / day.tokens_asked)}), in ${plural(day.requests, "request")}.` : "No requests."),
    h("p", { class: "soft" }, sinceOf(day, 86400)));
}
const sinceOf = (window, seconds) => window.since > state.history.time - seconds + 90 ? `Counted since ${minute(window.since)}, when the server was started.` : `Since ${moment(window.since)}.`;
function renderDiskCard(store) {
  const off = state.stats.server.disk_off;
  if (!store || off) {
    return put(body("card-disk"), h("p", { class: "big bad" }, store ? "Not all right" : "Off"), h("p", {}, said(off || "There is no store."), /[.!?]$/.test(off) ? "" : "."),
      h("p", { class: "soft" }, "Requests are answered from memory meanwhile."));
  }
  const troubles = [
    store.quarantine.length ? `${plural(store.quarantine.length, "damaged file")} in quarantine` : "",
    store.eviction_paused ? `eviction is paused: ${store.eviction_paused}` : "",
    store.daily_write_bytes !== null && store.written_today_bytes >= 0.95 * store.daily_write_bytes ? "today's write budget is spent" : "",
    ...store.quotas.filter(one => one.near).map(one => `the quota of ${one.kind === "salt" ? `the salt ${one.name.slice(0, 8)}` : one.name} is nearly used up: ${bytes(one.bytes)} of ${bytes(one.max_bytes)}`),
    store.free_bytes < store.min_free_bytes ? `only ${bytes(store.free_bytes)} are free on the file system` : "",
  ].filter(Boolean);
  put(body("card-disk"),
    h("p", { class: troubles.length ? "big bad" : "big good" }, troubles.length ? "Look here" : "All right"),
    h("p", {}, `${bytes(store.bytes.total)} of ${bytes(store.max_bytes)} are taken (${percent(store.bytes.total / Math.max(1, store.max_bytes))}).`, troubles.length ? h("span", { class: "bad" }, ` ${troubles.join("; ")}.`) : ""),
    h("p", { class: "soft" }, `${bytes(store.written_today_bytes)} written today${store.daily_write_bytes === null ? "" : ` of ${bytes(store.daily_write_bytes)}`}; ${bytes(store.free_bytes)} free on the file system.`));
}
function renderMost() {
  const one = state.most;
  if (!one) return put(body("card-most"), h("p", { class: "big" }, "–"), h("p", { class: "soft" }, "Nothing is stored."));
  put(body("card-most"),
    h("p", { class: "big" }, bytes(one.below.bytes)),
    h("p", { class: "cut" }, button("most", said(titleOf(one, one.id, one.labels)), () => act(() => details(one.id)), { "data-id": one.id, class: "title plain cut" })),
    h("p", { class: "soft" }, `${one.below.entries > 1 ? `This ${one.tier} prompt and the ${whole(one.below.entries - 1)} that go on from it` : `This ${one.tier} prompt`}; ${plural(one.num_tokens, "token")}, used ${age(one.below.last_use)}${age(one.below.last_use) === "now" ? "" : " ago"}.`));
  wantMost(one.id);
}
function renderRemote() {
  const one = state.stats.remote, card = $("card-remote");
  card.hidden = !one;
  card.parentElement.classList.toggle("shared", Boolean(one));
  if (!one) return;
  const words = { closed: "In use", open: "Left alone", "half-open": "Being tried", off: "Not used" };
  const count = name => one.counters[name] || 0, misses = sum(Object.values(one.misses));
  const why = Object.entries(one.misses).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([name, n]) => `${whole(n)} ${name.replaceAll("_", " ")}`);
  const again = one.breaker === "open" ? `, and tried again in ${duration(one.retry_in_s)}` : "";
  put(body("card-remote"),
    h("p", { class: `big ${one.breaker === "closed" ? "good" : "bad"}` }, `${words[one.breaker] || one.breaker}${again}`, h("span", { class: "soft" }, count("saved_ms") ? ` ${duration(count("saved_ms") / 1000)} saved` : "")),
    one.url ? h("p", { class: "cut" }, said(one.url)) : "",
    one.url ? h("p", {}, `${plural(one.hits, "hit")}, ${plural(misses, "miss", "misses")}${why.length ? ` (${why.join(", ")})` : ""}; ${bytes(count("received_bytes"))} received, ${bytes(count("sent_bytes"))} sent.`) : "",
    one.last_error ? h("p", { class: one.breaker === "closed" ? "soft" : "bad" }, "Last error: ", said(one.last_error)) : "",
    one.url ? h("p", { class: "soft" }, one.publishes ? `${plural(count("published"), "prompt")} published${one.queued ? `, ${whole(one.queued)} waiting` : ""}.` : "Only read: nothing is published.") : "");
}
const wantMost = id => { if (!state.previews.has(id)) wantPreviews([id, ...idsInSight]); };

// ---- what the cache saved ----
function renderWindows() {
  const history = state.history;
  if (!history) return;
  const names = { hour: "Last hour", day: "Last 24 hours", start: "Since the start" };
  const seconds = { hour: 3600, day: 86400, start: Infinity };
  const cell = (label, big, small, attrs) => h("td", { "data-label": label, ...attrs }, big, h("small", {}, small));
  put($("windows"), h("table", {},
    h("thead", {}, h("tr", {}, ["", "Requests", "Tokens reused", "", "Prefill saved"].map((text, place) => text ? h("th", { scope: "col", class: place === 2 ? "" : "num" }, text) : h("td", {})))),
    h("tbody", {}, history.windows.map(one => {
      const reused = reusedOf(one), parts = Object.entries(one.tokens_reused);
      const since = one.since > history.time - seconds[one.window] + 90 || one.window === "start" ? `since ${minute(one.since)}` : "";
      return h("tr", {},
        h("th", { scope: "row" }, names[one.window], h("small", {}, since)),
        cell("requests", whole(one.requests), [one.failed ? `${whole(one.failed)} failed` : "", one.left ? `${whole(one.left)} left` : ""].filter(Boolean).join(", "), { class: "num" }),
        cell("", one.tokens_asked ? `${whole(reused)} of ${whole(one.tokens_asked)}` : "–", parts.map(([source, n]) => `${whole(n)} ${source}`).join(", ")),
        h("td", {}, one.tokens_asked ? percent(reused / one.tokens_asked) : "", h("div", { class: "bar", "aria-hidden": "true" }, parts.map(([source, n]) => share(source, n / Math.max(1, one.tokens_asked))))),
        cell("saved", duration(one.saved_s), one.unmeasured ? `${plural(one.unmeasured, "more hit")} not measured` : "", { class: "num" }));
    }))));
  setText($("windows-note"), "Prefill saved is what computing the reused tokens takes here, less what reading them took. These figures are kept in memory and begin again when the server is started.");
}
const share = (name, part) => { const one = h("i", { class: name }); one.style.width = `${(100 * part).toFixed(2)}%`; return one; };

function grid(heads, rows) {
  return h("table", {},
    h("thead", {}, h("tr", {}, heads.map(([text, kind]) => h("th", { scope: "col", class: kind }, text)))),
    h("tbody", {}, rows.map(cells => h("tr", {}, cells.map((cell, place) => h("td", { class: heads[place][1] }, cell))))));
}
function renderSince() {
  const { server, store } = state.stats;
  renderReasons("misses", server.miss_reasons);
  renderReasons("partial", server.partial_reasons);
  const disk = new Map((store ? store.tiers : []).map(one => [one.tier, one]));
  const amount = (n, size) => n ? `${whole(n)} · ${bytes(size)}` : "–";
  put($("tiers"), grid(
    [["tier"], ["on disk", "num"], ["in memory", "num"], ["hits", "num"]],
    server.memory.tiers.map(one => {
      const there = disk.get(one.tier) || { entries: 0, bytes: 0, hits: 0 };
      return [tierName(one.tier), amount(there.entries, there.bytes), amount(one.entries, one.bytes), whole(there.hits)];
    })));
}
const tierName = name => h("span", { class: `name ${name}` }, h("span", { class: "dot", "aria-hidden": "true" }), name);
function renderReasons(id, counts) {
  const reasons = Object.entries(counts).sort((a, b) => b[1] - a[1]).slice(0, 8);
  put($(id), reasons.length ? grid([["times", "num"], ["why"]], reasons.map(([why, n]) => [whole(n), said(why)])) : h("span", { class: "soft" }, "None."));
}
