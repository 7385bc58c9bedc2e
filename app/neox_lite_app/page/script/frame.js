// The header with its tabs, the help, the keys, and the status strip that polls the server.
"use strict";

const KEYS = [
  ["Enter", "Send the message"],
  ["Shift + Enter", "New line in the message"],
  ["Esc", "Stop the answer; close a dialog or panel"],
  ["Ctrl / ⌘ + Enter", "Notebook: complete at the end"],
  ["Ctrl / ⌘ + Shift + Enter", "Notebook: complete at the cursor. Chat: another answer"],
  ["Ctrl / ⌘ + Shift + L", "New conversation"],
  ["Ctrl / ⌘ + Shift + S", "Sampling settings"],
  ["Ctrl / ⌘ + Shift + 1, 2, 3", "Model, Chat, Notebook"],
  ["← →", "Notebook probabilities: from token to token"],
  ["?", "This help"],
];

neox.help = () =>
  neox.dialog(
    "Help",
    h("p", {}, "Choose a model on the Model tab; then talk to it in Chat, or let it continue a text in the Notebook. ",
      "Base models (the demo too) only continue text, so they open in the Notebook. ",
      "All of it stays on this computer."),
    h("h3", {}, "Keys"),
    h("table", { class: "keys" }, h("tbody", {}, ...KEYS.map(([keys, what]) =>
      h("tr", {}, h("th", { scope: "row" }, ...keys.split(/( \+ |, | \/ )/).map((part, i) => (i % 2 ? part : h("kbd", {}, part)))),
        h("td", {}, what))))),
  );

neox.parts.header = (element) => {
  const tabs = Object.entries(neox.VIEWS).map(([view, label]) =>
    h("button", { type: "button", role: "tab", id: `nx-tab-${view}`, "aria-controls": `nx-view-${view}`,
      click: () => neox.go(view) }, label));
  const list = h("div", { role: "tablist", class: "tabs", "aria-label": "Views", keydown: (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  } }, ...tabs);
  const theme = h("button", { type: "button", class: "tool", click: () => {
    neox.remember("theme", document.body.classList.contains("dark") ? "light" : "dark");
    neox.theme();
  } });
  const settings = neox.tool("sliders", "Sampling settings", () => neox.toggle("settings"), { id: "nx-open-settings" });
  neox.on("theme", (on) => {
    const label = on ? "Light colours" : "Dark colours";
    theme.setAttribute("aria-label", label);
    theme.title = label;
    theme.replaceChildren(neox.icon(on ? "sun" : "moon"));
  });
  neox.on("view", (view) => {
    for (const [i, name] of Object.keys(neox.VIEWS).entries()) {
      tabs[i].setAttribute("aria-selected", String(name === view));
      tabs[i].tabIndex = name === view ? 0 : -1;
      const panel = document.getElementById(`nx-view-${name}`);
      panel?.setAttribute("role", "tabpanel");
      panel?.setAttribute("aria-labelledby", `nx-tab-${name}`);
    }
    settings.hidden = view === "model";
  });
  element.append(
    h("div", { class: "brand" }, h("span", { class: "mark", "aria-hidden": "true" }), h("h1", {}, "neox-lite")),
    list,
    h("div", { class: "tools" }, settings, theme, neox.tool("help", "Help and keys", neox.help)),
  );
  document.body.append(h("div", { id: "nx-notice-place", role: "alert" }));
  document.documentElement.lang = "en";
  neox.theme();
  const view = neox.recall("view", "sessionStorage");
  neox.go(Object.keys(neox.VIEWS).includes(view) ? view : "model");
};

/** Side panels: beside the text on a wide window, over it on a narrow one. */
neox.isOpen = (panel) => document.body.classList.contains(`show-${panel}`);
const WIDE = { settings: "(min-width: 1100px)", conversations: "(min-width: 820px)" };
neox.toggle = (panel, on) => {
  const wide = window.matchMedia(WIDE[panel]).matches;
  const name = wide ? `hide-${panel}` : `show-${panel}`;
  const shown = document.body.classList.contains(name) !== wide;
  const show = on ?? !shown;
  document.body.classList.toggle(name, show !== wide);
  const place = document.getElementById(`nx-${panel}`);
  if (show && !wide) place.querySelector("button, input")?.focus();
  if (!show && place.contains(document.activeElement)) document.getElementById(`nx-open-${panel}`)?.focus();
};

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const chord = (event.ctrlKey || event.metaKey) && event.shiftKey;
  const typing = event.target.matches?.("input, textarea, select");
  if (event.key === "Escape") {
    const open = ["settings", "conversations"].find(neox.isOpen);
    if (open) neox.toggle(open, false);
    else if (neox.isBusy(neox.view)) neox.emit("stop", neox.view);
  } else if (event.key === "?" && !typing) neox.help();
  else if (chord && /^Digit[123]$/.test(event.code)) neox.go(Object.keys(neox.VIEWS)[event.code.at(-1) - 1]);
  else if (chord && event.code === "KeyL") neox.emit("new");
  else if (chord && event.code === "KeyS") neox.toggle("settings");
  else if (chord && event.key === "Enter" && neox.view === "chat") neox.emit("again");
  else return;
  event.preventDefault();
});
// A narrow window's panel closes when its backdrop is touched.
document.addEventListener("click", (event) => {
  for (const panel of ["settings", "conversations"]) {
    const inside = event.target.closest?.(`#nx-${panel}, #nx-open-${panel}, dialog`);
    if (!inside && neox.isOpen(panel)) neox.toggle(panel, false);
  }
});

// Status --------------------------------------------------------------------------------------------------------------

const STATES = {
  empty: "No model", loading: "Loading", ready: "Ready", idle: "Asleep, wakes with the next message", failed: "Failed",
};

neox.parts.status = (element, props, trigger) => {
  const item = (name, label) => {
    const value = h("b", {}, "–");
    return { value, name, element: h("span", { class: `item ${name}`, title: label }, h("i", {}, label), value) };
  };
  const rate = item("rate", "tokens/s"), first = item("first", "first token"), used = item("used", "context");
  const memory = item("memory", "memory"), queue = item("queue", "queue");
  const model = h("button", { type: "button", class: "model", click: () => neox.go("model") });
  element.append(h("div", { class: "strip", role: "status", "aria-live": "off", "aria-label": "Status" },
    model, rate.element, first.element, used.element, memory.element, queue.element));

  const show = (status) => {
    const name = status.name || STATES[status.state];
    model.replaceChildren(h("span", { class: `dot ${status.state}` }), name);
    model.title = `${STATES[status.state]}${status.fault ? `: ${status.fault}` : ""}`;
    model.setAttribute("aria-label", `Model: ${name}, ${STATES[status.state]}`);
    memory.value.textContent = Object.entries(status.memory).filter(([, n]) => n)
      .map(([tier, n]) => `${tier.toUpperCase()} ${neox.bytes(n)}`).join(" · ") || "–";
    queue.value.textContent = `${status.active} running, ${status.waiting} waiting`;
    if (!used.value.dataset.mine && status.context) used.value.textContent = `0 of ${status.context.toLocaleString("en")}`;
  };
  neox.onUpdate("meter", (meter) => {
    used.value.dataset.mine = "yes";
    used.value.textContent = `${meter.used.toLocaleString("en")} of ${meter.context.toLocaleString("en")}`;
    used.element.classList.toggle("full", meter.used > 0.9 * meter.context);
    if (meter.first != null) first.value.textContent = meter.first < 1 ? `${Math.round(meter.first * 1000)} ms` : `${meter.first.toFixed(1)} s`;
    if (meter.rate != null) rate.value.textContent = neox.rate(meter.rate);
  });

  let asking = null, missing = null;
  const ask = () => {
    clearTimeout(asking);
    asking = setTimeout(ask, document.hidden ? 15000 : 3000);
    missing ??= setTimeout(late, 10000);
    trigger("poll", {});
  };
  /** No answer for long: a busy server still takes connections, one that is gone does not. */
  const late = async () => {
    const gone = await fetch("/health", { signal: AbortSignal.timeout(20000) }).then(() => false, (error) => error.name !== "TimeoutError");
    if (missing === null) return; // it came meanwhile
    missing = setTimeout(late, 10000);
    element.classList.add("lost");
    model.replaceChildren(h("span", { class: "dot failed" }), gone ? "No answer from neox-lite; is it still running?" : "neox-lite is slow to answer");
    if (gone) neox.emit("lost");
  };
  neox.onUpdate("status", (status) => {
    clearTimeout(missing);
    missing = null;
    element.classList.remove("lost");
    if (neox.status?.name !== status.name) delete used.value.dataset.mine;
    neox.status = status;
    show(status);
    neox.emit("status", status);
    if (status.task?.running) {
      clearTimeout(asking);
      asking = setTimeout(ask, 300);
    }
  });
  neox.poll = ask;
  document.addEventListener("visibilitychange", () => document.hidden || ask());
  ask();
};
