// ---- the timeline: a bar for each request, of which only those in sight are there ----
const BAR_H = 128, FIRST_TOP = 132, FIRST_H = 36, LEAST_STEP = 12, MOST_STEP = 26;
const bars = new Map();
const line = { step: LEAST_STEP, at: null, left: 0, room: 0, drawnFor: "" };

// The parts of a prompt by where they came from, in the order of the stack, and what is left.
function partsOf(one) {
  const reused = one.reused_tokens;
  const known = SOURCES.concat(Object.keys(reused).filter(name => !SOURCES.includes(name)));
  const found = known.filter(name => reused[name]).map(name => [name, reused[name]]);
  const rest = one.num_tokens - sum(found.map(part => part[1]));
  if (rest > 0) found.push(["computed", rest]);
  return found;
}
// What is not known to have been computed: its first token never came.
const computedWord = one => one.state === "done" || one.first_token_s !== null ? "computed" : "to compute";
const stateWord = one => ({ failed: "It failed", left: "Its client left", done: "Done" })[one.state];
function causeOf(one) {
  const parted = one.parted;
  if (one.state !== "done") return stateWord(one).toLowerCase();
  if (!parted || !parted.cause) return parted ? "goes on" : one.source === "miss" ? "nothing like it yet" : one.reason;
  return parted.cause.replaceAll("_", " ");
}
// A request in one or two sentences: how long, of what, why, and what would have helped.
function storyOf(one) {
  const parts = partsOf(one);
  if (!parts.length) return one.state === "done" ? "Its prompt is not known." : `${stateWord(one)}.`;
  const computed = sum(parts.filter(part => part[0] === "computed").map(part => part[1]));
  const text = [`${whole(computed)} of ${plural(one.num_tokens, "token")} ${computedWord(one)}`];
  if (one.waited_s > 0.2 && one.waited_s > 0.2 * (one.first_token_s || Infinity)) text.push(`${duration(one.waited_s)} waited before that`);
  if (one.restore_s > 0.2) text.push(`${duration(one.restore_s)} of look-up and reading`);
  let why = "";
  if (one.parted && one.parted.cause && !one.parted.is_new) why = ` ${one.parted.sentence}`;
  else if (!one.parted && one.reason) why = ` ${one.reason[0].toUpperCase()}${one.reason.slice(1)}.`;
  const helps = one.parted && one.parted.repairs.length ? ` --stabilize ${one.parted.repairs.join(",")} mends that.` : "";
  return `${one.state === "done" ? "" : `${stateWord(one)}. `}${text.join(", ")}.${why}${helps}`;
}
function nameOf(one) {
  const parts = partsOf(one).map(([name, n]) => `${whole(n)} ${name === "computed" ? computedWord(one) : `from ${name}`}`);
  return [
    clock(one.time), parts.length ? `${plural(one.num_tokens, "token")}: ${parts.join(", ")}` : stateWord(one),
    one.first_token_s === null ? "" : `first token after ${duration(one.first_token_s)}`,
    one.client, causeOf(one), one.repaired.length ? `repaired: ${one.repaired.join(", ")}` : "",
  ].filter(Boolean).join("; ");
}

function renderTimeline() {
  const all = state.requests, strip = $("strip");
  setText($("requests-count"), all.length ? `the latest ${whole(all.length)}` : "none yet");
  const step = Math.max(LEAST_STEP, Math.min(MOST_STEP, Math.floor(line.room / Math.max(1, all.length))));
  const width = all.length * step;
  if (step !== line.step) { line.step = step; clearBars(); }
  if (width !== line.width) {
    const atEnd = line.left + line.room >= (line.width || 0) - 2 * step;
    line.width = width;
    $("bars").style.width = `${width}px`;
    if (atEnd) { strip.scrollLeft = width; line.left = Math.max(0, width - line.room); }
  }
  const most = Math.max(1, ...all.map(one => one.num_tokens));
  const slowest = Math.max(0.001, ...all.map(one => one.first_token_s || 0));
  const scale = `${most} ${slowest}`;
  if (scale !== line.drawnFor) { clearBars(); line.drawnFor = scale; line.most = most; line.slowest = slowest; }
  setText($("scale-most"), all.length ? few(most) : "");
  setText($("scale-half"), all.length ? few(most / 2) : "");
  setText($("scale-first"), all.length ? duration(slowest) : "");
  if (!all.some(one => one.id === line.at)) line.at = all.length ? all[all.length - 1].id : null;
  drawBars();
  if (!bars.has(hovered)) readout(line.at);
}
function clearBars() {
  for (const one of bars.values()) if (one !== document.activeElement) one.remove();
  const kept = document.activeElement && document.activeElement.dataset.request;
  bars.clear();
  if (kept) document.activeElement.dataset.stale = "1";
}
let barFrame = 0;
function laterBars() { if (!barFrame) barFrame = requestAnimationFrame(() => { barFrame = 0; drawBars(); }); }
function drawBars() {
  const all = state.requests, step = line.step;
  const start = Math.max(0, Math.floor(line.left / step) - 10);
  const end = Math.min(all.length, Math.ceil((line.left + line.room) / step) + 10);
  const keep = new Set();
  const focused = document.activeElement && document.activeElement.dataset.request;
  for (let i = start; i < end; i++) {
    const one = all[i];
    keep.add(one.id);
    let bar = bars.get(one.id);
    if (!bar) { bar = barOf(one); bars.set(one.id, bar); $("bars").append(bar); }
    if (bar.dataset.at !== `${i} ${step}`) {
      bar.dataset.at = `${i} ${step}`;
      bar.style.left = `${i * step}px`;
      bar.style.width = `${step}px`;
    }
    bar.tabIndex = one.id === line.at ? 0 : -1;
  }
  for (const old of $("bars").querySelectorAll("button"))
    if (!keep.has(old.dataset.request) || bars.get(old.dataset.request) !== old) {
      if (bars.get(old.dataset.request) === old) bars.delete(old.dataset.request);
      old.remove();
    }
  if (focused && bars.has(focused) && document.activeElement === document.body) bars.get(focused).focus({ preventScroll: true });
}
function barOf(one) {
  const bar = h("button", { type: "button", "data-request": one.id, "data-key": `bar-${one.id}`, "aria-label": nameOf(one) });
  let top = BAR_H;
  for (const [name, n] of partsOf(one)) {
    const height = Math.max(1, Math.round(BAR_H * n / line.most));
    const part = h("i", { class: name });
    top -= height;
    part.style.top = `${Math.max(0, top)}px`;
    part.style.height = `${height}px`;
    bar.append(part);
  }
  if (one.repaired.length) { const mark = h("b"); mark.style.top = `${Math.max(0, top - 11)}px`; bar.append(mark); }
  if (one.state !== "done") { const sign = h("b", { class: "sign" }); sign.style.top = `${Math.max(0, top - 11)}px`; bar.append(sign); }
  if (one.first_token_s) {
    const first = h("i", { class: "first" });
    first.style.top = `${FIRST_TOP}px`;
    first.style.height = `${Math.max(1, Math.round(FIRST_H * one.first_token_s / line.slowest))}px`;
    bar.append(first);
  }
  return bar;
}
let hovered = "";
function readout(id) {
  const one = id && state.byId.get(id);
  put($("readout"), one ? said(nameOf(one)) : "");
}
function moveBar(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
  if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const all = state.requests;
  const i = Math.min(all.length - 1, Math.max(0, all.findIndex(one => one.id === line.at) + steps[event.key]));
  line.at = all[i].id;
  const strip = $("strip"), left = i * line.step;
  if (left < line.left) strip.scrollLeft = left;
  else if (left + line.step > line.left + line.room) strip.scrollLeft = left + line.step - line.room;
  line.left = strip.scrollLeft;
  drawBars();
  bars.get(line.at).focus({ preventScroll: true });
}
function startTimeline() {
  const box = $("bars");
  const idOf = event => { const bar = event.target.closest("button"); return bar ? bar.dataset.request : ""; };
  $("strip").addEventListener("scroll", () => { line.left = $("strip").scrollLeft; laterBars(); }, { passive: true });
  box.addEventListener("keydown", moveBar);
  box.addEventListener("click", event => { const id = idOf(event); if (id) { line.at = id; drawBars(); act(() => requestDetails(id)); } });
  box.addEventListener("pointerover", event => { hovered = idOf(event); readout(hovered || line.at); });
  box.addEventListener("pointerleave", () => { hovered = ""; readout(line.at); });
  box.addEventListener("focusin", event => { const id = idOf(event); if (id) { line.at = id; readout(id); } });
  put($("requests-legend"), ["disk", "memory", "computed"].map(name => h("li", { class: name }, h("span", { class: "dot" }), name)),
    h("li", {}, "below: time to the first token"), h("li", {}, "◆ repaired"), h("li", { class: "bad" }, "● failed or left"));
  line.room = $("strip").clientWidth;
  new ResizeObserver(() => { line.room = $("strip").clientWidth; if (state.stats) renderTimeline(); }).observe($("strip"));
}
