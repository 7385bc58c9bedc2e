// The chat: the list of conversations, the turns of one, the answer that streams in, and the box to write in.
"use strict";

/** The conversation that this browser tab shows. system: null until the server has sent it. */
const shown = { id: "", system: null, form: "auto" };
/** What every event of the chat carries. */
const payload = (more = {}) => ({ conversation: shown.id, system: shown.system, form: shown.form, settings: neox.settings(), ...more });
const show = (id, system) => {
  Object.assign(shown, { id, system });
  neox.remember("conversation", id, "sessionStorage");
  neox.remember("conversation", id);
  neox.emit("shown");
};
/** Ids of new conversations are made here: they can be written into before the server has heard of them. */
const unused = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

neox.parts.conversations = (element, props, trigger) => {
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search conversations", input: () => draw() });
  const list = h("ul", { class: "conversations" });
  const fresh = h("button", { type: "button", class: "button new", id: "nx-new", click: () => neox.emit("new") }, neox.icon("plus"), "New conversation");
  let listed = { entries: [], read: 0 };
  const open = (id, system) => {
    show(id, system);
    trigger("open", { conversation: id });
  };
  const pick = async () => {
    const file = await neox.pick(".json,.md,.markdown,application/json,text/markdown");
    if (!file) return;
    if (file.size > 900000) neox.notice(`${file.name}: ${neox.bytes(file.size)}, more than the 0.9 MB that the page can import.`);
    else trigger("import", payload({ name: file.name, text: await file.text() }));
  };
  element.append(
    h("div", { class: "panel-head" }, h("h2", {}, "Conversations"),
      neox.tool("open", "Import a conversation", pick, { id: "nx-import" }),
      neox.tool("close", "Close the list", () => neox.toggle("conversations", false), { class: "tool narrow" })),
    fresh, search, list,
  );
  const rename = async (entry) => {
    const title = await neox.ask("Rename the conversation", { value: entry.title, action: "Rename" });
    if (title !== null) trigger("rename", payload({ id: entry.id, title }));
  };
  const remove = async (entry) => {
    if (!(await neox.ask(`Delete “${entry.title}”?`, { action: "Delete" }))) return;
    trigger("delete", payload({ id: entry.id }));
    if (entry.id === shown.id) open(unused(), "");
  };
  const when = (iso) => {
    const date = new Date(iso);
    const today = date.toDateString() === new Date().toDateString();
    return date.toLocaleString([], today ? { hour: "2-digit", minute: "2-digit" } : { day: "numeric", month: "short" });
  };
  const draw = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const entries = listed.entries.filter((entry) => words.every((w) => entry.title.toLowerCase().includes(w)));
    neox.replace(list, entries.map((entry) => {
      const here = entry.id === shown.id;
      return h("li", { class: here ? "here" : "", "data-key": entry.id },
        h("button", { type: "button", class: "title", name: "title", "aria-current": here ? "true" : null, title: entry.problem || entry.title,
          click: () => { neox.toggleIfNarrow("conversations"); open(entry.id, null); } },
          h("span", {}, entry.title), h("small", {}, entry.problem ? "cannot be read" : when(entry.updated))),
        !entry.problem && neox.tool("edit", `Rename ${entry.title}`, () => rename(entry)),
        neox.tool("trash", `Delete ${entry.title}`, () => remove(entry)));
    }), fresh);
    if (!entries.length) list.append(h("li", { class: "muted" }, words.length ? "No conversation has these words in its title" : "Your conversations will be kept here"));
  };
  neox.on("new", () => { neox.go("chat"); neox.toggleIfNarrow("conversations"); open(unused(), ""); });
  neox.on("shown", draw);
  neox.onUpdate("conversations", (found) => {
    if (found.read < listed.read) return;
    listed = found;
    draw();
  });
  // The one that this browser tab showed last, or else the one that any did.
  const remembered = [neox.recall("conversation", "sessionStorage"), neox.recall("conversation")];
  open(remembered.find((id) => /^[0-9a-f]{32}$/.test(id)) || unused(), null);
};
neox.toggleIfNarrow = (panel) => neox.isOpen(panel) && neox.toggle(panel, false);

// Turns ---------------------------------------------------------------------------------------------------------------

neox.parts.transcript = (element, props, trigger) => {
  const turns = h("div", { class: "turns", role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const aloud = h("div", { class: "offscreen", "aria-live": "polite" });
  const foot = h("button", { type: "button", class: "to-end", hidden: true, click: () => end(true) }, "↓ Newest");
  const title = h("h2", { class: "conversation-title" });
  const exportAs = (kind) => trigger("export", payload({ kind }));
  const menu = h("details", { class: "menu" },
    h("summary", { class: "tool", "aria-label": "Export", title: "Export" }, neox.icon("save")),
    h("div", { class: "sheet" },
      h("button", { type: "button", click: () => { menu.open = false; exportAs("json"); } }, "Export as JSON"),
      h("button", { type: "button", click: () => { menu.open = false; exportAs("markdown"); } }, "Export as Markdown")));
  document.addEventListener("click", (event) => menu.contains(event.target) || (menu.open = false));
  const scroll = h("div", { class: "scroll", tabindex: "0", "aria-label": "Conversation", role: "region" }, turns);
  element.append(
    h("div", { class: "chat-head" },
      neox.tool("list", "Conversations", () => neox.toggle("conversations"), { id: "nx-open-conversations" }),
      title, neox.tool("code", "Raw prompt", () => trigger("raw", payload())), menu),
    scroll, foot, aloud);

  // Stay at the end while it grows, unless the reader has scrolled up.
  let following = true;
  const end = (force) => { if (following || force) scroll.scrollTop = scroll.scrollHeight; };
  scroll.addEventListener("scroll", () => {
    following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
    foot.hidden = following;
  });

  let view = { turns: [], read: 0 }; // the conversation as the server sent it last
  let asked = null; // what the server has not answered yet: {request: its id, text of a message, id of an edited one}
  let live = null; // the answer that streams in
  let halting = false; // it is to be stopped as soon as there is one
  const coming = new Map(); // answer -> what has streamed in of it
  const edits = new Map(); // message -> the elements in which it is being edited

  const act = (name, id, more = {}) => {
    if (neox.isBusy("chat")) return;
    following = true;
    const request = unused();
    if (!trigger(name, payload({ id, request, ...more }))) return;
    if (name === "switch") return;
    asked = { request, edited: name === "edit" && id };
    if (document.activeElement.closest(".turn-tools")) scroll.focus({ preventScroll: true }); // they are hidden meanwhile
    neox.setBusy("chat", true);
  };

  const edit = (turn, box) => {
    const area = h("textarea", { class: "edit", name: "edit", "aria-label": "Edit the message", rows: "1" });
    area.value = turn.text;
    const done = (keep) => {
      const text = area.value;
      if (keep && text.trim() && text !== turn.text) return act("edit", turn.id, { text });
      edits.delete(turn.id);
      draw();
    };
    area.addEventListener("input", () => fitHeight(area, 400));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(false); }
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && turn.role === "user") { event.preventDefault(); done(true); }
    });
    edits.set(turn.id, [area, h("div", { class: "actions" },
      h("button", { type: "button", class: "button", click: () => done(false) }, "Cancel"),
      h("button", { type: "button", class: "button primary", click: () => done(true) }, turn.role === "user" ? "Send" : "Save"))]);
    box.replaceChildren(...edits.get(turn.id));
    fitHeight(area, 400);
    area.focus();
  };

  const tools = (turn, box, last) => {
    const copy = neox.tool("copy", "Copy", async () => {
      await neox.copy(turn.text);
      copy.replaceChildren(neox.icon("check"));
      setTimeout(() => copy.replaceChildren(neox.icon("copy")), 1200);
    });
    const [at, of] = turn.place;
    return h("div", { class: "turn-tools", role: "group", "aria-label": turn.role === "user" ? "Your message" : "Answer" },
      of > 1 && h("span", { class: "siblings" },
        h("button", { type: "button", class: "tool", name: "previous", "aria-label": "Previous version", disabled: at === 1, click: () => act("switch", turn.id, { step: -1 }) }, "‹"),
        h("span", { "aria-label": `Version ${at} of ${of}` }, `${at}/${of}`),
        h("button", { type: "button", class: "tool", name: "next", "aria-label": "Next version", disabled: at === of, click: () => act("switch", turn.id, { step: 1 }) }, "›")),
      copy,
      neox.tool("edit", "Edit", () => edit(turn, box)),
      turn.role === "assistant" && neox.tool("again", "Regenerate", () => act("regenerate", turn.id)),
      turn.role === "user" && last && neox.tool("again", "Answer", () => act("regenerate", turn.id)),
      turn.role === "assistant" && last && neox.tool("more", "Continue", () => act("continue", turn.id)),
      neox.tool("branch", "Branch into a new conversation", () => act("branch", turn.id)),
      turn.note && h("span", { class: "muted note" }, turn.note));
  };

  const draw = () => {
    title.textContent = view.turns.length ? view.title : "";
    live = null;
    const nodes = [];
    const waiting = asked?.text ? [{ role: "user", text: asked.text }, { role: "assistant", text: "" }] : [];
    [...view.turns, ...waiting].forEach((turn, i) => {
      if (view.dropped && i === view.dropped) nodes.push(h("p", { class: "dropped", role: "note" }, view.dropped_note));
      const body = h("div", { class: "body" });
      const box = h("article", { class: `turn ${turn.role}${i < view.dropped ? " old" : ""}`, "data-key": i, "aria-label": turn.role === "user" ? "You" : "Answer" }, body);
      const streams = turn.role === "assistant" && turn.id === (waiting.length ? undefined : view.live);
      if (turn.role === "user") body.textContent = turn.text;
      else {
        const prose = new neox.Prose(body);
        prose.add(turn.text + (streams ? coming.get(turn.id) || "" : ""));
        if (streams) box.classList.add("live");
        else prose.end();
        if (streams && turn.id) live = { id: turn.id, prose };
      }
      if (turn.id && !streams) box.append(tools(turn, body, i === view.turns.length - 1));
      if (edits.has(turn.id) && !streams) body.replaceChildren(...edits.get(turn.id));
      nodes.push(box);
    });
    if (!nodes.length) nodes.push(welcome());
    neox.replace(turns, nodes, scroll);
    if (!live) coming.clear();
    neox.setBusy("chat", Boolean(live || asked));
    if (live && halting) neox.emit("stop", "chat");
    halting &&= Boolean(asked);
    end();
  };
  const welcome = () => {
    const ready = ["ready", "idle"].includes(neox.status?.state);
    return h("div", { class: "welcome" }, h("span", { class: "mark", "aria-hidden": "true" }),
      h("p", {}, ready ? "Write a message to begin." : "No model is loaded yet."),
      ready ? neox.status.base && h("p", { class: "muted" }, `${neox.status.name} is a base model: it continues text and was not taught to converse. The Notebook suits it better.`)
        : h("button", { type: "button", class: "button primary", click: () => neox.go("model") }, "Choose a model"));
  };

  neox.onUpdate("answer", ({ id, text, end: ended }) => {
    coming.set(id, (coming.get(id) || "") + text);
    if (live?.id !== id) return;
    live.prose.add(text);
    end();
    if (ended) aloud.textContent = coming.get(id).slice(0, 1000);
  });
  let model = "";
  neox.on("status", (status) => {
    const key = `${status.state} ${status.name} ${status.base}`;
    if (key !== model && !view.turns.length) draw();
    model = key;
  });
  neox.on("again", () => {
    const last = view.turns.at(-1);
    if (last) act("regenerate", last.id);
  });
  neox.on("stop", (place) => { halting = place === "chat" && !live; });
  neox.on("asked", (message) => { asked = message; following = true; draw(); });
  neox.onUpdate("refused", ({ request }) => { if (asked?.request === request) { asked = null; draw(); } });
  neox.on("shown", () => {
    if (view.id === shown.id) return;
    [view, asked, following] = [{ id: shown.id, turns: [], read: 0 }, null, true];
    draw();
  });
  neox.onUpdate("transcript", (value) => {
    if (value.asked !== shown.id) return; // another conversation is shown by now
    if (asked?.request === value.request) {
      edits.delete(asked?.edited);
      asked = null;
    }
    if (value.id !== view.id || value.read >= view.read) {
      view = value;
      const writing = value.id === shown.id && document.activeElement.id === "nx-system-text";
      show(value.id, writing ? shown.system : value.system);
    }
    draw();
  });
  draw();
};

const fitHeight = (area, most) => {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, most)}px`;
};

/** The system text and the prompt form. */
neox.parts.about = (element, props, trigger) => {
  const area = h("textarea", { id: "nx-system-text", rows: "2", "aria-describedby": "nx-system-hint",
    input: () => { shown.system = area.value; fitHeight(area, 200); }, change: () => trigger("keep", payload()) });
  const form = h("select", { id: "nx-form", change: () => { shown.form = form.value; } },
    ...props.forms.map(([label, value]) => h("option", { value }, label)));
  element.append(h("details", { class: "about", toggle: () => fitHeight(area, 200) }, h("summary", {}, "System text and prompt form"),
    h("div", { class: "field text" }, h("label", { for: area.id }, "System text"), area,
      h("small", { id: "nx-system-hint" }, "Stands before the conversation, where the prompt form has a place for it")),
    h("div", { class: "field text" }, h("label", { for: form.id }, "Prompt form"), form)));
  neox.on("shown", () => { if (shown.system !== area.value) area.value = shown.system ?? ""; });
};

neox.parts.composer = (element, props, trigger) => {
  const area = h("textarea", { rows: "1", placeholder: "Message", "aria-label": "Message", id: "nx-message" });
  const send = h("button", { type: "button", class: "send", "aria-label": "Send", title: "Send (Enter)", click: () => go() }, neox.icon("send"));
  const stop = h("button", { type: "button", class: "stop", "aria-label": "Stop", title: "Stop (Esc)", click: () => neox.emit("stop", "chat") }, neox.icon("stop"));
  element.append(h("div", { class: "composer" }, area, send, stop));
  let sent = null; // the message that the server has not answered yet: {text, request}
  const keep = () => neox.remember("draft", together(), "sessionStorage");
  const together = () => [sent?.text, area.value].filter(Boolean).join("\n");
  const write = (text) => {
    area.value = text;
    fitHeight(area, 200);
  };
  const go = () => {
    const text = area.value;
    if (!text.trim() || neox.isBusy("chat")) return;
    neox.notice("");
    const request = unused();
    if (!trigger("send", payload({ text, request }))) return;
    write("");
    sent = { text, request };
    keep();
    neox.emit("asked", sent);
  };
  area.addEventListener("input", () => { fitHeight(area, 200); keep(); });
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing) {
      event.preventDefault();
      go();
    }
  });
  neox.on("stop", (view) => view === "chat" && trigger("stop", payload()));
  neox.on("lost", () => { back(); neox.emit("asked", null); });
  neox.on("view", (view) => view === "chat" && setTimeout(() => area.focus({ preventScroll: true })));
  // What could not be sent stands in the box again, before what was written there meanwhile; a reload keeps it.
  const back = () => {
    write(together());
    sent = null;
    keep();
  };
  neox.onUpdate("refused", ({ request }) => { if (sent?.request === request) back(); });
  neox.onUpdate("transcript", ({ request }) => {
    if (sent?.request !== request) return;
    sent = null;
    keep();
  });
  write(neox.recall("draft", "sessionStorage") || "");
};
