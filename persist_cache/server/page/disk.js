// ---- the disk: its budget now, over the last day, and what is written each day ----
function renderDisk() {
  const { store, server } = state.stats, history = state.history, off = server.disk_off;
  put($("h-disk"), "Disk ", off ? h("span", { class: "bad" }, "is off: ", said(off)) : h("span", { class: "good" }, "is on"));
  const parts = store ? store.tiers.map(one => [one.tier, one.bytes]) : [];
  const total = store ? store.bytes.total : 0, scale = store ? Math.max(store.max_bytes, total, 1) : 1;
  if (store) parts.push(["other", Math.max(0, total - sum(parts.map(part => part[1])))]);
  const bar = $("bar");
  if (bar.children.length !== parts.length) bar.replaceChildren(...parts.map(([name]) => h("i", { class: name })));
  parts.forEach(([, n], place) => { bar.children[place].style.width = `${100 * n / scale}%`; });
  const used = store ? `${bytes(total)} of ${bytes(store.max_bytes)} (${percent(total / scale)})` : "nothing is stored";
  bar.setAttribute("aria-label", `Budget: ${used}`);
  put($("legend"), h("li", {}, h("b", {}, used)),
    parts.map(([name, n]) => h("li", { class: name }, h("span", { class: "dot" }), `${name === "other" ? "index and other" : name} ${bytes(n)}`)));
  put($("left"), notes(store, history));
  if (!history) return;
  diskChart(history);
  daysChart(history);
}
function notes(store, history) {
  if (!store) return [];
  const free = history ? history.reclaimable : {}, found = [];
  if (free.not_pinned !== undefined) found.push(h("li", {}, `When room is needed, all but what is pinned may go: ${bytes(free.not_pinned)}.`, free.expired ? ` Expired, and first to go: ${bytes(free.expired)}.` : ""));
  if (store.quarantine.length) found.push(h("li", { class: "bad" }, `${plural(store.quarantine.length, "damaged file")} in quarantine, ${bytes(sum(store.quarantine.map(one => one.bytes)))}; evict --all removes them.`));
  if (store.eviction_paused) found.push(h("li", { class: "bad" }, "Eviction is paused: ", said(store.eviction_paused)));
  return found.concat(store.left_behind.map(leftBehind));
}
const quoted = text => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
// The command in a shell, of this store: it is named unless commands use it by themselves.
const commandOf = rest => `persist-cache${state.stats.default_store ? "" : ` --store ${quoted(state.stats.store.store)}`} ${rest}`;
function leftBehind(one) {
  const code = text => h("code", {}, commandOf(text));
  return h("li", { class: "stale" },
    `${plural(one.entries, "entry", "entries")}, ${bytes(one.bytes)}, ${one.entries === 1 ? "is" : "are"} of no use any more: ${one.reason}. `,
    one.pinned ? [`${whole(one.pinned)} of them pinned: `, code("unpin ID"), " first. "] : [],
    code("evict --stale"), ` removes ${one.entries === 1 ? "it" : "them"}.`);
}

// Charts of a hundred shapes, drawn by hand: a library that could be inlined is larger than the page.
const W = 400, H = 118, PAD = { left: 4, right: 4, top: 14, bottom: 16 };
function plot(id, label, ...shapes) {
  const box = $(id);
  const chart = s("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  chart.append(...shapes.flat());
  const before = box.firstElementChild;
  if (before && before.isEqualNode(chart)) return;
  box.replaceChildren(chart, ...[]);
}
const text = (x, y, content, anchor) => {
  const mark = s("text", { x, y, "text-anchor": anchor || "start" });
  mark.textContent = content;
  return mark;
};
function diskChart(history) {
  const points = history.disk.filter(one => one.total !== null);
  if (!points.length) return empty("disk-chart", "The disk is off.");
  const first = points[0].at, last = Math.max(points[points.length - 1].at, first + 10);
  const most = Math.max(1, ...points.map(one => one.total)), budget = history.max_bytes || 0;
  // The budget is drawn where that leaves something to be seen of what is taken.
  const top = budget && budget < 4 * most ? Math.max(budget, most) * 1.05 : most * 1.15;
  const x = at => PAD.left + (W - PAD.left - PAD.right) * (at - first) / (last - first);
  const y = n => PAD.top + (H - PAD.top - PAD.bottom) * (1 - n / top);
  const shapes = [s("line", { class: "base", x1: 0, x2: W, y1: y(0), y2: y(0) })];
  const stretches = [];
  for (const one of history.disk) {
    if (one.total === null) { stretches.push([]); continue; }
    if (!stretches.length) stretches.push([]);
    stretches[stretches.length - 1].push(one);
  }
  for (const stretch of stretches.filter(one => one.length)) {
    const wide = stretch.length > 1 ? stretch : [stretch[0], { ...stretch[0], at: last }];
    let below = wide.map(() => 0);
    for (const name of ["system", "user", "assistant"]) {
      if (!wide.every(one => one.tiers)) break;
      const above = wide.map((one, place) => below[place] + (one.tiers[name] || 0));
      shapes.push(s("polygon", { class: `area ${name}`, points: [...wide.map((one, place) => `${x(one.at)},${y(above[place])}`), ...wide.map((one, place) => `${x(one.at)},${y(below[place])}`).reverse()].join(" ") }));
      below = above;
    }
    shapes.push(s("polyline", { class: "whole", points: wide.map(one => `${x(one.at)},${y(one.total)}`).join(" ") }));
  }
  if (budget && budget <= top) shapes.push(s("line", { class: "limit", x1: 0, x2: W, y1: y(budget), y2: y(budget) }));
  const now = points[points.length - 1].total;
  plot("disk-chart", `On disk since ${minute(first)}: from ${bytes(points[0].total)} to ${bytes(now)}, at most ${bytes(most)}${budget ? `, of a budget of ${bytes(budget)}` : ""}`, shapes);
  labels("disk-chart", [minute(first), `now ${bytes(now)}`], budget && budget <= top ? `budget ${bytes(budget)}` : `most ${bytes(most)}`);
}
function daysChart(history) {
  const days = history.written;
  if (!days.length) return empty("days-chart", "The disk is off.");
  const budget = history.daily_write_bytes, most = Math.max(1, ...days.map(one => one.bytes));
  const top = budget && budget < 4 * most ? Math.max(budget, most) * 1.05 : most * 1.15;
  const step = (W - PAD.left - PAD.right) / days.length;
  const y = n => PAD.top + (H - PAD.top - PAD.bottom) * (1 - n / top);
  const shapes = [s("line", { class: "base", x1: 0, x2: W, y1: y(0), y2: y(0) })];
  days.forEach((one, place) => {
    const title = s("title");
    title.textContent = `${one.day}: ${bytes(one.bytes)}`;
    shapes.push(s("rect", { class: "disk", x: PAD.left + place * step + step * .15, width: step * .7, y: y(one.bytes), height: Math.max(0, y(0) - y(one.bytes)) }, title));
  });
  if (budget !== null && budget <= top) shapes.push(s("line", { class: "limit", x1: 0, x2: W, y1: y(budget), y2: y(budget) }));
  const today = days[days.length - 1];
  plot("days-chart", `Written today: ${bytes(today.bytes)}${budget === null ? "" : ` of ${bytes(budget)}`}; on the days before: ${days.slice(0, -1).map(one => bytes(one.bytes)).join(", ")}`, shapes);
  labels("days-chart", [days[0].day.slice(5), `today ${bytes(today.bytes)}`], budget === null ? (days.some(one => one.bytes) ? `most ${bytes(most)}` : "") : `budget ${bytes(budget)} a day`);
}
function empty(id, why) { put($(id), h("p", { class: "soft" }, why)); }
// Beside the chart, not in it: a chart that is stretched would stretch its letters.
function labels(id, [left, right], above) {
  const box = $(id);
  let row = box.querySelector(".labels");
  if (!row) { row = h("div", { class: "labels soft", "aria-hidden": "true" }, h("span"), h("span"), h("span")); box.append(row); }
  [above, left, right].forEach((words, place) => setText(row.children[place], words));
}
