// A model's text as it streams: a little Markdown, line by line, made of text nodes. No links, no images, no HTML.
"use strict";

const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?\S|\S)\*\*|(?<![\w*])\*(?=\S)([^*\n]*[^*\s])\*(?![\w*])/g;
const LONG = 2000; // characters of a line beyond which it is plain text

/** `code`, **strong** and *emphasis* of one line, as nodes. */
neox.inline = (line) => {
  if (line.length > LONG) return [line];
  const nodes = [];
  let at = 0;
  for (const found of line.matchAll(INLINE)) {
    nodes.push(line.slice(at, found.index));
    if (found[1]) nodes.push(h("code", {}, found[2]));
    else if (found[3]) nodes.push(h("strong", {}, ...neox.inline(found[3])));
    else nodes.push(h("em", {}, ...neox.inline(found[4])));
    at = found.index + found[0].length;
  }
  nodes.push(line.slice(at));
  return nodes.filter((node) => node !== "");
};

/** Text that grows at its end; an addition costs what it itself holds, and the line that is still open. */
neox.Prose = class {
  constructor(place) {
    this.place = place;
    this.place.replaceChildren();
    this.open = ""; // the last line, not ended yet
    this.block = null; // where lines go: a paragraph, a list, code
    this.drawn = []; // the nodes of the open line
    this.fence = null;
  }

  add(text) {
    const lines = (this.open + text).split("\n");
    this.open = lines.pop();
    for (const line of lines) {
      this.undraw();
      this.line(line);
    }
    this.undraw();
    if (this.open && !(this.open.length < 4 && /^(```?|#+|[-*]|\d+\.?)$/.test(this.open))) this.draw(this.open);
  }

  /** The end: an open line stays as it is. */
  end() {
    this.undraw();
    if (this.open) this.line(this.open);
    this.open = "";
  }

  undraw() {
    if (!this.drawn.length) return;
    this.drawn.forEach((node) => node.remove());
    this.drawn = [];
    this.block = this.before;
  }

  /** Draw the open line so that it can be taken back: only as more of a block, or as a new one. */
  draw(line) {
    this.before = this.block;
    const [place, count] = [this.block ?? this.place, (this.block ?? this.place).childNodes.length];
    const blocks = this.place.childNodes.length;
    const fence = this.fence;
    this.line(line);
    this.fence = fence;
    this.drawn = [...this.place.childNodes].slice(blocks);
    if (place !== this.place) this.drawn.push(...[...place.childNodes].slice(count));
  }

  line(line) {
    const mark = line.match(/^\s*(```+|~~~+)/);
    if (this.fence) {
      if (mark && mark[1].startsWith(this.fence) && line.trim() === mark[1]) this.fence = this.block = null;
      else this.block.append(this.block.childNodes.length ? `\n${line}` : line);
      return;
    }
    if (mark) {
      this.fence = mark[1];
      this.start("pre");
      return;
    }
    if (!line.trim()) {
      this.block = null;
      return;
    }
    const heading = line.match(/^(#{1,4})\s+(.+)$/);
    const item = line.match(/^\s*(?:[-*•]|(\d{1,3})[.)])\s+(.*)$/);
    if (heading) {
      this.start(`h${heading[1].length + 2}`).append(...neox.inline(heading[2]));
      this.block = null;
    } else if (item) {
      const tag = item[1] ? "ol" : "ul";
      if (this.block?.localName !== tag) this.start(tag, item[1] ? { start: item[1] } : {});
      this.block.append(h("li", {}, ...neox.inline(item[2])));
    } else if (line.startsWith("> ")) {
      if (this.block?.localName !== "blockquote") this.start("blockquote");
      this.grow(line.slice(2));
    } else {
      if (this.block?.localName !== "p") this.start("p");
      this.grow(line);
    }
  }

  start(tag, attributes) {
    this.block = h(tag, attributes);
    this.place.append(this.block);
    return this.block;
  }

  grow(line) {
    if (this.block.childNodes.length) this.block.append("\n");
    this.block.append(...neox.inline(line));
  }
};
