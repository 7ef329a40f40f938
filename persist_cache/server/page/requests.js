// ---- requests, a row each, the latest first; and the story of one ----
let requestRows;
const requestAt = i => state.requests[state.requests.length - 1 - i];
function startRequests() {
  requestRows = new Rows($("requests"), "Requests, the latest first", {
    get length() { return state.requests.length; },
    key: i => requestAt(i).id,
    has: key => state.byId.has(key),
    version: () => 0,
    make: i => requestRow(requestAt(i)),
  });
}
function requestRow(one) {
  const bar = h("span", { class: "bar", "aria-hidden": "true" });
  for (const [name, n] of partsOf(one)) { const part = h("i", { class: name }); part.style.width = `${100 * n / one.num_tokens}%`; bar.append(part); }
  const found = sum(Object.values(one.reused_tokens));
  return h("div", { class: "row" },
    h("span", {}, clock(one.time)), bar,
    h("span", { class: "num" }, one.num_tokens ? `${whole(found)} of ${whole(one.num_tokens)}` : "–"),
    h("span", { class: "num" }, one.first_token_s === null ? "–" : duration(one.first_token_s)),
    h("span", { class: "who soft cut", title: one.client }, said(one.client)),
    h("span", { class: one.state === "done" ? "why cut" : "why cut bad" }, causeOf(one), one.repaired.length ? h("span", { class: "soft" }, ` · repaired: ${one.repaired.join(", ")}`) : ""),
    h("span", { class: "acts" }, button(`r-${one.id}`, "Why", () => act(() => requestDetails(one.id)), { class: "title plain", "aria-label": `Why: ${nameOf(one)}` })));
}
function renderRequests() {
  renderTimeline();
  if (!state.requests.length) {
    requestRows.clear();
    if (!$("requests").querySelector(".empty")) $("requests").append(h("p", { class: "empty soft" }, "No request was answered yet. Each will be here, with what was reused of its prompt, and why it was no more."));
    return;
  }
  const none = $("requests").querySelector(".empty");
  if (none) none.remove();
  requestRows.draw();
}

async function requestDetails(id) {
  const one = await call("GET", `/v1/cache/requests/${id}`);
  const parts = partsOf(one), parted = one.parted;
  const bar = h("div", { class: "bar", "aria-hidden": "true" });
  for (const [name, n] of parts) { const part = h("i", { class: name }); part.style.width = `${100 * n / one.num_tokens}%`; bar.append(part); }
  const rows = facts([
    ["sent", `${moment(one.time)} to ${one.path}`], ["client", one.client && said(one.client)], ["model", one.model && said(one.model)],
    ["outcome", { done: "answered", failed: "it failed", left: "its client left before the answer was over" }[one.state]],
    ["first token", one.first_token_s === null ? "" : `after ${duration(one.first_token_s)}${timesOf(one)}`],
    ["answer", one.output_tokens ? plural(one.output_tokens, "token") : ""],
    ["saved", one.saved_s ? `${duration(one.saved_s)} of prefill` : ""],
    ["to the disk", one.written_tokens ? plural(one.written_tokens, "token") : ""],
    ["remote", one.remote && `${one.remote.why.replaceAll("_", " ")}${one.remote.seconds ? ` after ${duration(one.remote.seconds)}` : ""}`],
    ["repaired", one.repaired.join(", ")],
    ["went on from", wentOn(one)],
    ["why no more", one.reason && said(one.reason)],
  ]);
  const story = parted && parted.cause ? causeStory(one, parted) : parted
    ? [h("p", {}, `Nothing was lost: it goes on from where an earlier request ended.`)]
    : [h("p", { class: "soft" }, one.source === null ? "The cache was not asked." : "No earlier request that is remembered is like it.")];
  show(`Request of ${clock(one.time)}`,
    h("ul", { class: "legend" }, parts.map(([name, n]) => h("li", { class: name }, h("span", { class: "dot" }), `${whole(n)} ${name === "computed" ? computedWord(one) : `from ${name}`}`)), h("li", {}, `of ${plural(one.num_tokens, "token")}`)),
    bar, story, h("h3", {}, "The request"), rows,
    h("div", { class: "acts" },
      one.replayable ? button("warm", "Keep it ready…", () => act(() => warmForm(one))) : h("span", { class: "soft" }, "Its text is not kept, so it cannot be computed again."),
      closing()));
}
function timesOf(one) {
  const parts = [];
  if (one.waited_s) parts.push(`${duration(one.waited_s)} in the line`);
  if (one.restore_s) parts.push(`${duration(one.restore_s)} to look it up and read it`);
  const rest = one.first_token_s - (one.waited_s || 0) - (one.restore_s || 0);
  if (one.computed_tokens > 1 && rest > 0) parts.push(`${duration(rest)} to compute ${whole(one.computed_tokens)} tokens`);
  return parts.length ? `: ${parts.join(", ")}` : "";
}
function wentOn(one) {
  if (!sum(Object.values(one.reused_tokens))) return "";
  if (!one.entry) return one.entry === null ? "what was in memory; nothing of it is stored now" : "";
  const entry = one.entry;
  return [button("entry", said(entry.label || preview(entry.id).text || `${entry.tier} ${entry.id.slice(0, 6)}`), () => act(() => details(entry.id)), { class: "plain" }),
    ` (${entry.tier}, ${plural(entry.num_tokens, "token")}${entry.num_tokens > one.cached_tokens ? `, of which it shares the first ${whole(one.cached_tokens)}` : ""})`];
}
function causeStory(one, parted) {
  const found = [h("p", {}, h("b", {}, said(parted.sentence)), parted.code ? h("span", { class: "soft" }, ` (${parted.code})`) : "")];
  if (parted.also.length) found.push(h("p", { class: "soft" }, `Further on it differs by: ${parted.also.map(one => one.replaceAll("_", " ")).join(", ")}.`));
  const where = [parted.at && `${parted.at}${parted.role ? ` (${parted.role})` : ""}`, parted.character === null ? "" : `character ${whole(parted.character)}`, `token ${whole(parted.shared_tokens)}`].filter(Boolean).join(", ");
  found.push(h("p", { class: "soft" }, "It parts from ", button("earlier", "an earlier request", () => act(() => requestDetails(parted.id)), { class: "plain" }), ` at ${where}.`));
  if (parted.old !== undefined || parted.new !== undefined) {
    const [oldRest, newRest] = apart(parted.old || "", parted.new || "");
    const side = (name, [differs, rest]) => [h("h3", {}, name), h("pre", { tabindex: "0" }, said(`…${parted.before || ""}`), h("mark", {}, differs ? said(differs) : "(nothing)"), said(rest))];
    found.push(...side("The earlier one", oldRest), ...side("This one", newRest));
  } else if (!state.stats.texts) found.push(h("p", { class: "soft" }, "The server was started with --no-text: prompts are not shown."));
  if (!parted.is_new) found.push(h("p", {}, `Lost: ${plural(parted.lost_tokens, "token")}${parted.lost_s === null ? "" : `, about ${duration(parted.lost_s)} of prefill`}.`));
  if (parted.repairs.length) {
    const names = [...new Set([...state.stats.stabilize, ...parted.repairs])].sort().join(",");
    found.push(h("p", {}, "What mends it, added to the server's command:"), copyable(`--stabilize ${names}`));
  }
  for (const one of parted.switches) found.push(h("p", {}, parted.repairs.length ? "Or in the client:" : "What mends it, in the client:"), copyable(one));
  return found;
}
// Where two texts differ, from their first character on, to where they are the same again.
function apart(one, other) {
  const a = [...one], b = [...other];
  let same = 0;
  while (same < a.length && same < b.length && a[a.length - 1 - same] === b[b.length - 1 - same]) same++;
  const cut = text => [text.slice(0, text.length - same).join(""), text.slice(text.length - same).join("")];
  return [cut(a), cut(b)];
}
