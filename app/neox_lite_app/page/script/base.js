// What every part of the page uses: elements from text nodes only, the parts' registry, dialogs, notices, views and theme.
"use strict";
const neox = { parts: {} };
window.neox = neox;

// Elements ------------------------------------------------------------------------------------------------------------

/** An element; attributes that are functions are listeners, children are elements or text. Nothing is parsed as HTML. */
neox.h = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
};
const { h } = neox;

const ICONS = {
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M19 5l-2 2M7 17l-2 2",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5z",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  list: "M4 6h16M4 12h16M4 18h10",
  help: "M9 9a3 3 0 1 1 4.2 2.7c-.8.4-1.2 1-1.2 1.8v.5M12 17.5v.01",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  again: "M4 12a8 8 0 0 1 13.7-5.7L20 8.5M20 4v4.5h-4.5M20 12a8 8 0 0 1-13.7 5.7L4 15.5M4 20v-4.5h4.5",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
  more: "M5 12h10M11 7l5 5-5 5M19 6v12",
  branch: "M7 4v16M7 14c6 0 10-2 10-7M17 4v3",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  trash: "M5 7h14M10 4h4M7 7l1 13h8l1-13M10 11v5M14 11v5",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  open: "M12 16V5M7 9l5-5 5 5M5 20h14",
  undo: "M9 6L4 11l5 5M4 11h10a6 6 0 0 1 0 12h-2",
  check: "M5 12.5l4.5 4.5L19 7",
  code: "M9 7l-5 5 5 5M15 7l5 5-5 5",
};
neox.icon = (name) => {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  svg.append(path);
  return svg;
};

/** A button with an icon; its label is read aloud and shown as a tooltip. */
neox.tool = (icon, label, click, attributes = {}) =>
  h("button", { type: "button", class: "tool", name: icon, "aria-label": label, title: label, click, ...attributes }, neox.icon(icon));

/** New rows in place of the old. What has the focus keeps it, or else the control of its name in the row of its data-key
 *  gets it; `otherwise` where there is none. */
neox.replace = (place, rows, otherwise) => {
  const held = place.contains(document.activeElement) ? document.activeElement : null;
  const key = held?.closest("[data-key]")?.dataset.key;
  place.replaceChildren(...rows);
  if (!held) return;
  const row = rows.find((row) => row.dataset.key === key);
  const same = held.isConnected ? held : held.name && row?.querySelector(`[name="${held.name}"]:enabled`);
  (same || otherwise).focus({ preventScroll: true });
};

// Parts ---------------------------------------------------------------------------------------------------------------

const MAX_SENT = 1000000; // bytes of an event; with what Gradio writes around them, as many as the server takes
/** Start a part in the element that Gradio made for it. Its `trigger` tells whether the event is sent, or else why not. */
neox.mount = (kind, element, props, trigger, watch) => neox.parts[kind](element, props, (event, data) => {
  const { size } = new Blob([JSON.stringify(data)]);
  if (size > MAX_SENT) neox.notice(`These are ${neox.bytes(size)} of text, more than the 1 MB that the page can send; shorten it.`);
  else trigger(event, data);
  return size <= MAX_SENT;
}, watch);

const busy = new Set();
/** Whether this browser's chat or notebook is waiting for an answer; shown by CSS through data-busy. */
neox.setBusy = (name, on) => {
  on ? busy.add(name) : busy.delete(name);
  document.getElementById(`nx-view-${name}`)?.toggleAttribute("data-busy", on);
  neox.emit("busy", { name, on });
};
neox.isBusy = (name) => busy.has(name);

neox.emit = (name, detail) => document.dispatchEvent(new CustomEvent(`neox:${name}`, { detail }));
neox.on = (name, listener) => document.addEventListener(`neox:${name}`, (event) => listener(event.detail));

/** What the server sends in answer to an event: lines of JSON, updates by their kinds. Gradio hands over the whole text each
 *  time, of which only the end is new; its first line is another one for each event, as two may be answered at once. */
neox.parts.reply = (element, props, trigger, watch) => {
  const seen = new Map(); // first line -> characters read
  watch("value", () => {
    const text = props.value;
    const first = text.slice(0, text.indexOf("\n") + 1);
    const lines = text.slice(seen.get(first) ?? first.length).split("\n");
    seen.set(first, text.length - lines.pop().length);
    for (const line of lines) {
      for (const [kind, update] of Object.entries(JSON.parse(line))) neox.emit(`update:${kind}`, update);
    }
  });
};
/** Listen to updates of one kind. */
neox.onUpdate = (kind, listener) => neox.on(`update:${kind}`, listener);

// Views, theme, storage -----------------------------------------------------------------------------------------------

const VIEWS = { model: "Model", chat: "Chat", notebook: "Notebook" };
neox.VIEWS = VIEWS;
neox.view = "model";
neox.go = (view) => {
  neox.view = view;
  neox.remember("view", view, "sessionStorage");
  document.body.dataset.view = view;
  neox.emit("view", view);
};

/** What this browser remembers; without storage (private windows) it forgets, and all else works. */
neox.recall = (key, store = "localStorage") => {
  try { return window[store].getItem(`neox-lite.${key}`); } catch { return null; }
};
neox.remember = (key, value, store = "localStorage") => {
  try { window[store].setItem(`neox-lite.${key}`, value); } catch { /* no storage here */ }
};

const dark = window.matchMedia("(prefers-color-scheme: dark)");
neox.theme = () => {
  const chosen = neox.recall("theme");
  const on = chosen ? chosen === "dark" : dark.matches;
  document.body.classList.toggle("dark", on);
  document.documentElement.style.colorScheme = on ? "dark" : "light";
  neox.emit("theme", on);
  return on;
};
dark.addEventListener("change", neox.theme);

// Notices, dialogs, downloads -----------------------------------------------------------------------------------------

/** A sentence that stays until it is closed; the next one takes its place. */
neox.notice = (text) => {
  const place = document.getElementById("nx-notice-place");
  place.replaceChildren();
  if (!text) return;
  place.append(
    h("div", { class: "notice" }, h("p", {}, text), neox.tool("close", "Dismiss", () => neox.notice(""))),
  );
};

/** A modal with a title; Escape and a click beside it close it. */
neox.dialog = (title, ...content) => {
  const dialog = h("dialog", { class: "nx-dialog", "aria-label": title });
  dialog.append(
    h("header", {}, h("h2", {}, title), neox.tool("close", "Close", () => dialog.close())),
    h("div", { class: "content" }, ...content),
  );
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
};

/** Ask for one line of text, or (without a value) for a yes. Resolves to null where it is called off. */
neox.ask = (title, { value, action = "OK" } = {}) =>
  new Promise((resolve) => {
    const input = value === undefined ? null : h("input", { type: "text", value, maxlength: "200", "aria-label": title });
    let answer = null;
    const form = h(
      "form",
      { submit: (event) => { event.preventDefault(); answer = input ? input.value.trim() : true; dialog.close(); } },
      input,
      h(
        "div",
        { class: "actions" },
        h("button", { type: "button", class: "button", click: () => dialog.close() }, "Cancel"),
        h("button", { type: "submit", class: "button primary" }, action),
      ),
    );
    const dialog = neox.dialog(title, form);
    dialog.addEventListener("close", () => resolve(answer));
    (input || form.querySelector("[type=submit]")).focus();
    input?.select();
  });

neox.download = (name, type, text) => {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

neox.copy = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard outside https and localhost
    const area = h("textarea", { class: "offscreen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
};

neox.pick = (accept) =>
  new Promise((resolve) => {
    const input = h("input", { type: "file", accept, class: "offscreen", "aria-label": "File to import" });
    input.addEventListener("change", async () => { resolve(input.files[0] || null); input.remove(); });
    input.addEventListener("cancel", () => { resolve(null); input.remove(); });
    document.body.append(input);
    input.click();
  });

neox.onUpdate("notice", neox.notice);
neox.onUpdate("download", ({ name, type, text }) => neox.download(name, type, text));
neox.onUpdate("prompt", ({ text, note }) =>
  neox.dialog("Raw prompt", h("p", { class: "muted" }, note), h("pre", { tabindex: "0", class: "raw" }, text)));

neox.bytes = (count) => {
  if (count >= 2 ** 30) return `${(count / 2 ** 30).toFixed(1)} GiB`;
  return `${Math.max(count / 2 ** 20, count ? 0.1 : 0).toFixed(count < 10 * 2 ** 20 ? 1 : 0)} MiB`;
};
neox.rate = (rate) => (rate == null ? "–" : rate >= 10 ? rate.toFixed(0) : rate.toFixed(1));
