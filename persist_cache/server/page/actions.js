// ---- what a click does ----
async function act(what) {
  try { await what(); if ($("alert").dataset.act) $("alert").hidden = true; }
  catch (error) {
    if (error.status === 401) askToken();
    else warn(error.status ? error.message : "The server cannot be reached.", true);
  }
}
async function pin(id, pinned) { await call(pinned ? "PUT" : "DELETE", `/v1/cache/entries/${id}/pin`); await tick(true); }

let opener = null;
function show(title, ...content) {
  const dialog = $("dialog");
  if (!dialog.open) opener = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : null;
  dialog.replaceChildren(h("h2", { id: "dialog-title", tabindex: "-1" }, title), ...content.flat(3).filter(Boolean));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  (dialog.querySelector("[autofocus]") || $("dialog-title")).focus();
  return dialog;
}
const closing = text => h("button", { type: "button", class: "last", on: { click: () => $("dialog").close() } }, text || "Close");
const facts = rows => h("table", {}, h("tbody", {}, rows.filter(([, value]) => value).map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value)))));
function copyable(text) {
  const code = h("code", {}, text);
  const copy = h("button", { type: "button", "aria-label": `Copy ${text}`, on: { click: async () => {
    try { await navigator.clipboard.writeText(text); }
    catch {  // not allowed where the page came over plain HTTP from elsewhere
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    setText(copy, "Copied");
  } } }, "Copy");
  return h("div", { class: "command" }, code, copy);
}

// ---- one entry ----
async function details(id) {
  const [one, found] = await Promise.all([call("GET", `/v1/cache/entries/${id}`), call("GET", `/v1/cache/previews?ids=${id}`).catch(error => { if (error.status === 401) throw error; return { previews: {}, notes: [] }; })]);
  const seen = found.previews[one.id] || {};
  const rows = facts([
    ["begins", seen.text ? said(seen.text) : found.notes.length ? said(found.notes.join(" ")) : state.stats.texts ? "" : "not shown: the server was started with --no-text"],
    ["label", one.label && said(one.label)], ["model", said(one.model)], ["tier", one.tier], ["tokens", whole(one.num_tokens)],
    ["turns", seen.turns ? whole(seen.turns) : ""], ["last client", seen.client ? [said(seen.client), seen.request ? [" ", button("by", "its request", () => act(() => requestDetails(seen.request)), { class: "plain" })] : ""] : ""],
    ["own", `${bytes(one.own_bytes)}, needed by nothing else`], ["shared", `${bytes(one.shared_bytes)}, with other entries`],
    ["files", whole(one.runs.length + (one.checkpoint ? 1 : 0))], ["hits", whole(one.hits)], ["saved", one.saved_s ? `${duration(one.saved_s)} of prefill` : ""],
    ["group", one.group && said(one.groups ? one.groups.join(", ") : one.group)],
    ["created", moment(one.created)], ["used", moment(one.last_use)], ["expires", one.expires ? moment(one.expires) : ""],
    ["kept", one.pinned ? "pinned: it goes only when it is evicted by name" : ""],
    ["continues", one.parent ? button("parent", h("span", { class: "mono" }, one.parent), () => act(() => details(one.parent)), { class: "plain" }) : ""],
    ["continued by", one.children.length ? plural(one.children.length, "entry", "entries") : ""],
    ["entry", h("span", { class: "mono" }, one.id)],
  ]);
  const text = h("pre", { hidden: true, tabindex: "0", "aria-label": "The prompt" });
  const reveal = button("reveal", "Show text", () => act(async () => {
    const whole = (await call("GET", `/v1/cache/entries/${one.id}?text=true`)).text || "";
    // A line of a megabyte is no use to anybody, and slow to lay out.
    text.replaceChildren(said(visible(whole.slice(0, 20000))), whole.length > 20000 ? `\n… and ${(whole.length - 20000).toLocaleString("en-US")} characters more: ${commandOf(`show ${one.short_id} --text`)}` : "");
    text.hidden = false;
    reveal.disabled = true;
  }));
  show(`${one.tier} entry ${one.short_id}`, rows, text, h("div", { class: "acts" },
    button("pin", one.pinned ? "Unpin" : "Pin", () => act(async () => { await pin(one.id, !one.pinned); await details(one.id); })),
    button("label", "Label…", () => labelForm(one)),
    button("ttl", "Lifetime…", () => ttlForm(one)),
    button("export", "Export", () => act(() => exported(one))),
    state.stats.texts ? reveal : null,
    button("evict", "Evict…", () => act(() => evict(one.id, one.children.length > 0)), { class: "danger" }), closing()));
}
// Control characters as their pictures; a bell or an escape has no look of its own.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, one => one === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + one.charCodeAt(0)));

function form(title, fields, submit, done, back) {
  const form = h("form", { on: { submit: event => { event.preventDefault(); act(async () => { await done(form); }); } } }, fields,
    h("div", { class: "acts" }, h("button", { type: "submit" }, submit), button("back", "Cancel", back || (() => $("dialog").close()), { class: "last" })));
  show(title, form);
  const first = form.querySelector("input, select");
  if (first) first.focus();
  return form;
}
function labelForm(one) {
  const input = h("input", { type: "text", id: "label", maxlength: 200, autocomplete: "off", value: one.label });
  form(`Label of ${one.short_id}`, [h("label", { for: "label" }, "A name for this prompt; empty takes it away."), input], "Save", async () => {
    const label = input.value.trim();
    await call(label ? "PUT" : "DELETE", `/v1/cache/entries/${one.id}/label`, label ? { label } : undefined);
    await tick(true);
    await details(one.id);
  }, () => act(() => details(one.id)));
}
const LIFETIMES = [["3600", "1 hour"], ["86400", "1 day"], ["604800", "7 days"], ["2592000", "30 days"], ["", "no end"]];
const lifetimes = chosen => h("select", { id: "ttl" }, LIFETIMES.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
function ttlForm(one) {
  const choice = lifetimes("86400");
  form(`Lifetime of ${one.short_id}`, [h("p", { class: "soft" }, one.expires ? `It expires at ${moment(one.expires)}.` : "It does not expire."), h("label", { for: "ttl" }, "Expires after, from now:"), choice], "Save", async () => {
    await call(choice.value ? "PUT" : "DELETE", `/v1/cache/entries/${one.id}/ttl`, choice.value ? { ttl_s: Number(choice.value) } : undefined);
    await tick(true);
    await details(one.id);
  }, () => act(() => details(one.id)));
}
async function exported(one) {
  const bundle = await (await ask("GET", `/v1/cache/export?ids=${one.id}`)).blob();
  const link = h("a", { href: URL.createObjectURL(bundle), download: `persist-cache-${one.short_id}.tar` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  tell(`Exported ${bytes(bundle.size)}. The bundle holds the prompt; persist-cache import reads it.`);
}

// ---- eviction: what the command would do, said before ----
const MOST_NAMED = 100;
async function evict(id, branches) {
  const plans = [{ below: false, plan: await call("DELETE", `/v1/cache/entries/${id}?below=false&dry_run=true`) }];
  if (branches) plans.push({ below: true, plan: await call("DELETE", `/v1/cache/entries/${id}?below=true&dry_run=true`) });
  const one = plans[0].plan.entries[0];
  const choices = plans.length > 1 && plans[1].plan.entries.length > 1 ? plans : plans.slice(0, 1);
  const title = titleOf(one);
  const cancel = h("button", { type: "button", class: "last", autofocus: true, on: { click: () => $("dialog").close() } }, "Cancel");
  show(`Evict ${one.tier} entry ${one.short_id}?`, h("p", { class: "cut" }, said(title)),
    choices.map(({ below, plan }) => [
      h("h3", {}, below ? `It and what goes on from it: ${plural(plan.entries.length, "entry", "entries")}` : "This entry alone"),
      consequences(plan, one).map(text => h("p", {}, text)),
      // A command that is cut short would evict something else.
      plan.entries.length > MOST_NAMED ? null : copyable(commandOf(`evict ${plan.entries.map(entry => entry.short_id).join(" ")}`)),
      h("div", { class: "acts" }, h("button", { type: "button", class: "danger", id: below ? "really-below" : "really", on: { click: () => act(async () => {
        const done = await call("DELETE", `/v1/cache/entries/${id}?below=${below}`);
        $("dialog").close();
        tell(`${plural(done.entries.length, "entry", "entries")} evicted, ${bytes(done.freed_bytes)} freed.`);
        await tick(true);
      }) } }, below ? `Evict all ${whole(plan.entries.length)}` : "Evict this entry")),
    ]), h("div", { class: "acts" }, cancel));
}
function consequences(plan, named) {
  const lines = [`This frees ${bytes(plan.freed_bytes)} on disk. What is in memory stays there.`];
  if (plan.dead_bytes) lines.push(`${bytes(plan.dead_bytes)} of their rows stay in files that other entries need, until those go or gc rewrites the file.`);
  if (plan.kept_for) lines.push(`${bytes(plan.kept_bytes)} stay, because ${plural(plan.kept_for, "other entry needs", "other entries need")} them.`);
  const stay = plan.skipped_pinned.length, goes = plan.entries.some(one => one.pinned && one.id === named.id);
  if (goes) lines.push(`This entry is pinned, and goes because it is named${stay ? `; ${plural(stay, "other pinned entry stays", "other pinned entries stay")}` : ""}.`);
  else if (stay) lines.push(`${plural(stay, "pinned entry stays", "pinned entries stay")}.`);
  return lines;
}

// ---- a recent request, computed again and kept ----
function warmForm(one) {
  const part = h("select", { id: "part" }, h("option", { value: "prompt" }, "the whole prompt"), h("option", { value: "system" }, "its system part alone, for all conversations"));
  const label = h("input", { type: "text", id: "warm-label", maxlength: 200, autocomplete: "off" });
  const pinned = h("input", { type: "checkbox", id: "warm-pin" });
  const ttl = lifetimes("");
  form(`Keep the prompt of ${clock(one.time)} ready`, [
    h("p", { class: "soft" }, "The model computes what is missing of it, and it goes to the disk."),
    h("label", { for: "part" }, "What is kept"), part, h("label", { for: "warm-label" }, "Label"), label,
    h("label", {}, pinned, " pinned"), h("label", { for: "ttl" }, "Lifetime"), ttl,
  ], "Keep it ready", async element => {
    element.querySelector("[type=submit]").disabled = true;
    const cache = { pin: pinned.checked, label: label.value.trim() };
    if (ttl.value) cache.ttl_s = Number(ttl.value);
    try {
      const done = await call("POST", `/v1/cache/requests/${one.id}/warm`, { part: part.value, cache });
      if (done.id === null) warn(`It was computed, but is not on the disk: ${done.disk_off || "saving took too long"}.`, true);
      else tell(`Ready: ${plural(done.num_tokens, "token")}, of which ${whole(done.found_tokens)} were there before; ${bytes(done.written_bytes)} written.`);
      $("dialog").close();
      await tick(true);
    } finally { element.querySelector("[type=submit]").disabled = false; }
  }, () => act(() => requestDetails(one.id)));
}

// ---- the token ----
function askToken() {
  if (asking) return;
  asking = true;
  const wrong = Boolean(state.token);
  const input = h("input", { type: "password", id: "token", autocomplete: "off", "aria-label": "Admin token", required: true });
  const dialog = show("Admin token", h("form", { on: { submit: event => {
    event.preventDefault();
    keepToken(input.value.trim());
    dialog.close();
  } } }, h("p", {}, wrong ? "That token is not right." : "This page needs the server's token."),
    h("p", { class: "soft" }, "Open the link that persist-cache page prints, or paste the token here."), input,
    h("div", { class: "acts" }, h("button", { type: "submit" }, "Go on"))));
  input.focus();
  dialog.addEventListener("close", () => { asking = false; tick(true); }, { once: true });
}
