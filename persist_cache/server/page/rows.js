// ---- rows of which only those in sight are there, of one height each ----
class Rows {
  // `source` has: length, key(i), has(key), version(i) (a row is made again when it changes), make(i).
  constructor(box, label, source) {
    this.box = box; this.source = source; this.shown = new Map(); this.top = 0;
    this.list = h("ul", { "aria-label": label });
    box.append(this.list);
    // Asked for where nothing has changed since: it would be laid out just for that.
    box.addEventListener("scroll", () => { this.top = box.scrollTop; this.later(); }, { passive: true });
    box.addEventListener("keydown", event => this.move(event));
    new ResizeObserver(() => { this.measure(); this.later(); }).observe(box);
    this.measure();
  }
  measure() {
    this.height = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    this.room = this.box.clientHeight;
  }
  later() { if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); }); }
  range() {
    const height = this.height, first = Math.floor(this.top / height);
    return [Math.max(0, first - 4), Math.min(this.source.length, first + Math.ceil(this.room / height) + 4)];
  }
  draw() {
    const height = this.height, [start, end] = this.range(), keep = new Set();
    this.list.style.height = `${this.source.length * height}px`;
    for (let i = start; i < end; i++) {
      const key = this.source.key(i), version = this.source.version(i);
      keep.add(key);
      let row = this.shown.get(key);
      if (!row || row.version !== version) row = this.renew(key, version, i, row);
      if (row.at !== i || row.height !== height) {
        row.at = i; row.height = height;
        row.item.style.transform = `translateY(${i * height}px)`;
        row.item.setAttribute("aria-posinset", i + 1);
      }
      if (row.of !== this.source.length) { row.of = this.source.length; row.item.setAttribute("aria-setsize", row.of); }
    }
    let lost = -1;
    for (const [key, row] of this.shown) {
      if (keep.has(key)) continue;
      // The row that has the focus stays when it is out of sight; when it is gone, its place has it.
      if (row.item.contains(document.activeElement)) { if (this.source.has(key)) continue; lost = row.at; }
      row.item.remove();
      this.shown.delete(key);
    }
    if (lost >= 0 && this.source.length) this.focus(Math.min(lost, this.source.length - 1));
    if (this.source.drawn) this.source.drawn(start, end);
  }
  renew(key, version, i, old) {
    if (old) { morph(old.item.firstChild, this.source.make(i)); old.version = version; return old; }
    const row = { item: h("li", {}, this.source.make(i)), version, at: -1, of: -1 };
    this.shown.set(key, row);
    this.list.insertBefore(row.item, this.after(i));
    return row;
  }
  after(i) {
    // In the order of the rows, so that Tab goes down.
    let next = null;
    for (const row of this.shown.values()) if (row.at > i && (!next || row.at < next.at)) next = row;
    return next ? next.item : null;
  }
  clear() { for (const row of this.shown.values()) row.item.remove(); this.shown.clear(); }
  move(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
    const item = event.target.closest("li");
    if (!item || event.altKey || event.ctrlKey || event.metaKey || !(event.key in steps)) return;
    const row = [...this.shown.values()].find(one => one.item === item);
    if (!row) return;
    event.preventDefault();
    this.focus(Math.min(this.source.length - 1, Math.max(0, row.at + steps[event.key])));
  }
  focus(i) {
    const height = this.height, top = i * height;
    if (top < this.top) this.box.scrollTop = top;
    else if (top + height > this.top + this.room) this.box.scrollTop = top + height - this.room;
    this.top = this.box.scrollTop;
    this.draw();
    const row = this.shown.get(this.source.key(i));
    const target = row && (row.item.querySelector(".title") || row.item.querySelector("button"));
    if (target) target.focus({ preventScroll: true });
  }
}
