// ---- putting it together ----
// Part by part, so that a key or a click in between is not kept waiting.
const PARTS = [renderGlance, renderRequests, renderWindows, renderDisk, renderEntries, renderSince, renderAges];
async function render() {
  for (const part of PARTS) {
    part();
    await new Promise(resolve => setTimeout(resolve));
  }
}
startTimeline();
startRequests();
startPrompts();
$("dialog").addEventListener("close", () => {
  const back = opener && document.querySelector(`[data-key="${CSS.escape(opener)}"]`);
  if (back) back.focus({ preventScroll: true });
});
$("as-tree").addEventListener("click", () => { if (!["used", "size"].includes(state.sort)) state.sort = "used"; return look("tree"); });
$("as-list").addEventListener("click", () => look("list"));
$("f-sort").addEventListener("input", () => sortBy($("f-sort").value));
let typing = 0;
for (const id of ["f-tier", "f-label", "f-model", "f-pinned"])
  $(id).addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => look("list"), 250); });
$("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  $("pause").setAttribute("aria-pressed", String(state.paused));
  setText($("pause"), state.paused ? "Go on" : "Pause");
  if (state.paused) { clearTimeout(timer); setText($("state"), "paused"); } else tick(true);
});
window.addEventListener("hashchange", () => {
  if (!takeToken()) return;
  if (asking) $("dialog").close(); else tick(true);
});
document.addEventListener("visibilitychange", () => { if (document.hidden) clearTimeout(timer); else tick(); });
tick(true);
