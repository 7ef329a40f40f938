"use strict";
// ---- elements, texts and numbers: everything goes in as text, never as markup ----
const $ = id => document.getElementById(id);
function h(tag, attrs, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") { element.acts = value; for (const event of Object.keys(value)) element.addEventListener(event, run); }
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter(one => one !== null && one !== undefined && one !== false));
  return element;
}
const run = event => event.currentTarget.acts[event.type](event);
const SVG = "http://www.w3.org/2000/svg";
function s(tag, attrs, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attrs || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
// The parts of a bar, one after the other. Scaled, not sized: what only looks moved moves no layout.
function lay(elements, shares) {
  let start = 0;
  elements.forEach((one, place) => { one.style.transform = `translateX(${(100 * start).toFixed(2)}%) scaleX(${shares[place].toFixed(4)})`; start += shares[place]; });
  return elements;
}
const segments = (parts, total) => lay(parts.map(([name]) => h("i", { class: name })), parts.map(([, n]) => n / total));
// What somebody else wrote: it may run from right to left, and must not turn what is around it.
const said = text => h("bdi", {}, String(text).slice(0, 4000));
// By hand: a bar, or a row, has several of them, and the browser's own take a hundred times as long.
const whole = n => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, ",");
const two = n => String(n).padStart(2, "0");
function bytes(n) {
  let value = n;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]) {
    if (value < 1023.5 || unit === "PiB") return `${unit === "B" ? Math.round(value) : value < 99.95 ? value.toFixed(1) : value.toFixed(0)} ${unit}`;
    value /= 1024;
  }
}
function few(n) {
  if (n < 1000) return String(Math.round(n));
  if (n < 999500) return `${(n / 1e3).toFixed(n < 9950 ? 1 : 0)}k`;
  return `${(n / 1e6).toFixed(1)}M`;
}
function duration(seconds) {
  if (!seconds) return "–";
  if (seconds < 0.0995) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  for (const [limit, length, unit] of [[59.5, 1, "s"], [3570, 60, "min"], [171000, 3600, "h"]])
    if (seconds < limit) { const v = seconds / length; return `${v < 9.95 ? v.toFixed(1) : v.toFixed(0)} ${unit}`; }
  return `${whole(seconds / 86400)} d`;
}
function age(then) {
  const seconds = Math.max(0, now() - then);
  if (seconds < 1) return "now";
  for (const [limit, length, unit] of [[60, 1, "s"], [3600, 60, "min"], [172800, 3600, "h"]])
    if (seconds < limit) return `${Math.floor(seconds / length)} ${unit}`;
  return `${whole(Math.floor(seconds / 86400))} d`;
}
const plural = (n, one, many) => `${whole(n)} ${n === 1 ? one : many || `${one}s`}`;
const moment = at => new Date(at * 1000).toLocaleString();
const clock = at => `${minute(at)}:${two(new Date(at * 1000).getSeconds())}`;
const minute = at => { const date = new Date(at * 1000); return `${two(date.getHours())}:${two(date.getMinutes())}`; };
const percent = x => x && x < 0.0005 ? "< 0.1 %" : `${(100 * x).toFixed(x && x < 0.0995 ? 1 : x > 0.9945 && x < 1 ? 1 : 0)} %`;
const sum = values => values.reduce((total, one) => total + one, 0);
const button = (key, text, act, attrs) => h("button", { type: "button", "data-key": key, on: { click: act }, ...attrs }, text);
function setText(element, text) { if (element.textContent !== text) element.textContent = text; }
// Only what changed is changed: focus, selection, a click that has begun and a screen reader are left alone.
function put(element, ...children) { morphChildren(element, h("div", {}, ...children)); }
function morphChildren(old, fresh) {
  const wanted = [...fresh.childNodes];
  wanted.forEach((one, place) => { if (place < old.childNodes.length) morph(old.childNodes[place], one); else old.append(one); });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}
function morph(old, fresh) {
  const isText = fresh.nodeType === Node.TEXT_NODE;
  if (old.nodeName !== fresh.nodeName || !isText && (old.dataset.key !== fresh.dataset.key || !old.acts !== !fresh.acts)) return old.replaceWith(fresh);
  if (isText) { if (old.data !== fresh.data) old.data = fresh.data; return; }
  old.acts = fresh.acts;
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) === value) continue;
    if (name === "style") old.style.cssText = value; else old.setAttribute(name, value);  // the policy lets no style in as text
  }
  morphChildren(old, fresh);
}

// ---- talking to the server ----
class Refused extends Error { constructor(status, text) { super(text); this.status = status; } }
async function ask(method, path, body, signal) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  const options = { method, headers, cache: "no-store", redirect: "error", signal };
  if (body !== undefined) { options.body = JSON.stringify(body); headers["Content-Type"] = "application/json"; }
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  let error = "";
  try { error = (await answer.json()).error; } catch { /* an empty answer */ }
  throw new Refused(answer.status, error || `The server answered ${answer.status}.`);
}
// A server that has stopped, or a tunnel that is cut, leaves a connection open and says nothing.
const call = async (method, path, body) => (await ask(method, path, body, method === "GET" ? AbortSignal.timeout(state.patience) : undefined)).json();
