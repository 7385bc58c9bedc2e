// The Model tab: what is loaded, the bundled demo, models on this computer and the family, with what the plan says of each.
"use strict";

neox.parts.models = (element, props, trigger) => {
  const loaded = h("div", {}), work = h("div", { "aria-live": "polite" }), local = h("div"), family = h("div");
  const path = h("input", { type: "text", id: "nx-path", placeholder: "/path/to/folder or owner/model", "aria-label": "Folder or hub id", spellcheck: "false", autocomplete: "off" });
  element.append(h("div", { class: "models" },
    loaded, work,
    h("section", {}, h("h2", {}, "On this computer"), local),
    h("section", {}, h("h2", {}, "Another one"),
      h("form", { class: "path", submit: (event) => { event.preventDefault(); if (path.value.trim()) start("start", path.value.trim()); } },
        path, h("button", { type: "submit", class: "button" }, "Load"))),
    h("section", {}, h("h2", {}, "The GPT-NeoX family"),
      h("p", { class: "muted" }, "Fetched once from the Hugging Face hub, then quantized here. The badge says where the result would run on this machine, with the memory it takes and the predicted speed."),
      family)));

  let mine = false; // whether this page started what runs, and is to open the model when it is there
  const start = (what, model, format) => {
    neox.notice("");
    mine = what === "start";
    trigger(what, { model, format });
  };

  const badge = (plan, label) => {
    if (!plan) return h("span", { class: "badge waiting" }, label ? `${label} ` : "", "measuring…");
    if (plan.error) return h("span", { class: "badge no", title: plan.error }, label ? `${label} ` : "", "cannot run");
    return h("span", { class: `badge ${plan.level}`, title: plan.sentence },
      label && h("b", {}, label), h("span", {}, plan.text), plan.rate && h("span", { class: "muted" }, plan.rate));
  };
  const action = (label, click, primary = false, name = "") =>
    h("button", { type: "button", class: `button ${primary ? "primary" : ""}`, "aria-label": name || null, click }, label);

  const quantize = (model, name, formats) => formats.map((format) =>
    action(format, () => start("quantize", model, format), false, `Quantize ${name} to ${format}`));

  const drawLocal = (models, formats) => local.replaceChildren(h("ul", { class: "cards" }, ...models.map((model) =>
    h("li", { class: `card${model.demo ? " demo" : ""}` },
      h("div", { class: "what" }, h("h3", {}, model.name), h("p", { class: "muted" }, model.about),
        model.problem ? h("p", { class: "problem" }, model.problem) : badge(model.plan)),
      h("div", { class: "do" },
        model.plain && h("span", { class: "group" }, h("span", { class: "muted" }, "Quantize"), ...quantize(model.id, model.name, formats)),
        !model.problem && action(model.demo ? "Start the demo" : "Load", () => start("start", model.id), true, model.demo ? "" : `Load ${model.name}`))))));

  const drawFamily = (members) => family.replaceChildren(h("div", { class: "family", role: "list" }, ...members.map((member) =>
    h("div", { class: "row", role: "listitem" },
      h("div", { class: "what" }, h("h3", {}, member.name), h("p", { class: "muted" }, member.about)),
      ...Object.entries(member.plans).map(([format, plan]) => h("div", { class: "offer" }, badge(plan, format),
        action("Get", () => start("quantize", member.id, format), false, `Get ${member.name} as ${format}`)))))));

  const drawLoaded = (status) => {
    const on = ["ready", "idle"].includes(status.state);
    loaded.replaceChildren(...(on ? [h("section", { class: "loaded" },
      h("div", { class: "what" }, h("p", { class: "muted" }, status.state === "idle" ? "Asleep: its memory is free, the next message wakes it" : "Loaded"),
        h("h2", {}, status.name), h("p", { class: "muted" }, status.about || "")),
      h("div", { class: "do" }, action("Chat", () => neox.go("chat"), !status.base), action("Notebook", () => neox.go("notebook"), status.base),
        action("Unload", () => trigger("release", {}))))]
      : [h("section", { class: "hello" }, h("h2", {}, "Choose a model"),
        h("p", {}, "Start with the demo: it is here already, tiny, and runs on anything. Everything stays on this computer."))]));
  };

  let shown = "", drawn = "", version = null, ended = "";
  const bar = h("progress", { max: "1" }), amount = h("span", { class: "muted" });
  const home = () => document.getElementById("nx-tab-model"); // of a focus that is left alone
  const drawTask = (task) => {
    if (!task || (task.kind === "load" && task.state === "done")) {
      drawn = "";
      return neox.replace(work, [], home());
    }
    const key = JSON.stringify([task.number, task.state, task.cancelled]);
    if (key !== drawn) { // a button that was drawn anew under the pointer would not be clicked
      drawn = key;
      bar.setAttribute("aria-label", task.title);
      const end = task.running ? action(task.cancelled ? "Cancelling…" : "Cancel", () => trigger("cancel", {}))
        : neox.tool("close", "Dismiss", () => trigger("dismiss", {}));
      const use = task.state === "done" && task.kind === "quantize" && action("Load it", () => start("start", task.result), true);
      for (const button of [end, use]) if (button) button.name = "end"; // the focus goes from one to the next
      neox.replace(work, [h("section", { class: `work ${task.state}`, "data-key": "" },
        h("div", { class: "line" }, h("h3", {}, task.title), task.running && amount, use, end),
        task.running && bar, task.message && h("p", { class: task.state === "failed" ? "problem" : "muted" }, task.message))], home());
    }
    if (task.total) bar.value = task.done / task.total;
    else bar.removeAttribute("value");
    amount.textContent = task.total ? `${Math.floor(100 * bar.value)} %, ${neox.bytes(task.done)} of ${neox.bytes(task.total)}` : "";
  };
  neox.on("status", (status) => {
    const key = JSON.stringify([status.state, status.name, status.about, status.base]);
    if (key !== shown) drawLoaded(status);
    shown = key;
    drawTask(status.task);
    const end = status.task && !status.task.running ? `${status.task.number} ${status.task.state}` : "";
    if (end && end !== ended && mine) {
      if (status.task.kind === "load" && status.task.state === "done") { mine = false; neox.go(status.base ? "notebook" : "chat"); }
    }
    ended = end;
    const fresh = `${status.version} ${neox.view === "model"}`;
    if (neox.view !== "model" || version === fresh) return;
    version = fresh;
    trigger("list", {});
  });
  neox.onUpdate("models", ({ local: models, family: members, formats }) => {
    drawLocal(models, formats);
    drawFamily(members);
  });
  neox.on("view", (view) => { if (view === "model") { version = null; neox.poll?.(); } });
};
