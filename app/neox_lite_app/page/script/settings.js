// The sampling panel: a form from a table of fields; its values stay in this browser.
"use strict";

neox.parts.settings = (element, props) => {
  const inputs = {};

  const keep = () => {
    neox.remember("settings", JSON.stringify(values()));
    mark();
  };
  /** What every event that asks for tokens says. */
  const values = neox.settings = () =>
    Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, input.type === "number" && input.value ? Number(input.value) : input.value]));

  const number = (field) => {
    const attributes = { min: field.low, max: field.high, step: field.step };
    const id = `nx-field-${field.name}`;
    const box = h("input", { type: "number", id, ...attributes, "aria-describedby": `${id}-hint` });
    const range = h("input", { type: "range", ...attributes, tabindex: "-1", "aria-hidden": "true" });
    box.addEventListener("input", () => { range.value = box.value; keep(); });
    range.addEventListener("input", () => { box.value = range.value; keep(); });
    box.show = (value) => { box.value = range.value = value; };
    inputs[field.name] = box;
    return h("div", { class: "field" },
      h("label", { for: id, title: field.hint }, field.label), box, range, h("small", { id: `${id}-hint` }, field.hint));
  };
  const text = ([name, [label, hint]]) => {
    const id = `nx-field-${name}`;
    const tag = name === "seed" ? "input" : "textarea";
    const box = h(tag, { id, rows: "2", spellcheck: "false", autocomplete: "off", inputmode: name === "seed" ? "numeric" : null,
      "aria-describedby": `${id}-hint`, placeholder: { seed: "random", stop: "", logit_bias: "42:-5" }[name] });
    box.addEventListener("input", keep);
    box.show = (value) => { box.value = value; };
    inputs[name] = box;
    return h("div", { class: "field text" }, h("label", { for: id, title: hint }, label), box, h("small", { id: `${id}-hint` }, hint));
  };

  const presets = Object.entries(props.presets).map(([name, preset]) =>
    h("button", { type: "button", class: "preset", "aria-pressed": "false", "data-name": name, click: () => { set(preset); keep(); } }, name));
  const mark = () => {
    const now = values();
    for (const button of presets) {
      const same = Object.entries(props.presets[button.dataset.name]).every(([name, value]) => now[name] === value);
      button.setAttribute("aria-pressed", String(same));
    }
  };
  const set = (given) => {
    for (const [name, value] of Object.entries(given)) inputs[name]?.show(value);
    mark();
  };

  const [main, rest] = [props.fields.slice(0, 4), props.fields.slice(4, -1)];
  element.append(
    h("div", { class: "panel-head" }, h("h2", {}, "Sampling"),
      neox.tool("close", "Close settings", () => neox.toggle("settings", false))),
    h("div", { class: "presets", role: "group", "aria-label": "Presets" }, ...presets),
    h("form", { class: "fields", submit: (event) => event.preventDefault() },
      number(props.fields.at(-1)), ...main.map(number), text(["seed", props.texts.seed]),
      h("details", {}, h("summary", {}, "Repetition, stop strings, bias"),
        ...rest.map(number), text(["stop", props.texts.stop]), text(["logit_bias", props.texts.logit_bias]))),
    h("button", { type: "button", class: "button quiet", click: () => { set(props.initial); keep(); } }, "Reset all"),
  );
  set(props.initial);
  try {
    set(JSON.parse(neox.recall("settings")) || {});
  } catch { /* not ours */ }
  neox.on("view", (view) => { document.body.classList.toggle("no-settings", view === "model"); });
  document.body.classList.toggle("no-settings", neox.view === "model");
};
