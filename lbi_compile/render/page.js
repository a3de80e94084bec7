"use strict";
// Draws the graph, lets modules be opened and closed, and moves the view. Rows, order and columns of every module's
// inside come from Python; here rows grow and things move apart where a module is open.
(() => {
  const data = JSON.parse(document.getElementById("picture").textContent);
  const { strings, boxes, strips, glyphs, roles, sizes } = data;
  const canvas = document.getElementById("canvas");
  const world = document.getElementById("world");
  const tip = document.getElementById("tip");
  const open = new Set();
  const view = { scale: 1, x: 0, y: 0 };
  let drawn = { width: 1, height: 1, order: [], elements: new Map(), bands: new Map() };
  let current = null;

  // boxes are arrays: see `_box` in html.py
  const LABEL = 0, NOTE = 1, NAME = 2, KIND = 3, PART = 4, WIDTH = 5, CHIP = 6, CHIPS = 7, ROLES = 8, COUNT = 9, FLOPS = 10,
    SHAPE = 11, OPERATOR = 12, READS = 13, REASONS = 14, FORM = 15;
  const text = (box, field) => strings[boxes[box][field]];
  const cut = (name) => (name.length > 64 ? `…${name.slice(-63)}` : name);
  const wide = (name) => sizes.letter * [...name].reduce((sum, c) => sum + (c.codePointAt(0) >= 0x1100 ? 2 : 1), 0);
  const isGroup = (box) => box in data.insides;

  // ---- where things are ----

  // Positions in order, gaps or more apart, nearest to the wanted ones: pool adjacent violators.
  function spread(wanted, pull, gaps) {
    const offsets = [0];
    for (const gap of gaps) offsets.push(offsets[offsets.length - 1] + gap);
    const pools = [];
    wanted.forEach((want, i) => {
      let pool = { mean: want - offsets[i], pull: pull[i], many: 1 };
      while (pools.length && pools[pools.length - 1].mean > pool.mean) {
        const other = pools.pop(), total = pool.pull + other.pull;
        pool = {
          mean: (pool.mean * pool.pull + other.mean * other.pull) / total, pull: total, many: pool.many + other.many,
        };
      }
      pools.push(pool);
    });
    return pools.flatMap((pool) => Array(pool.many).fill(pool.mean)).map((mean, i) => mean + offsets[i]);
  }

  // Extents of a box around the point where edges reach it.
  function extent(box) {
    if (open.has(box)) {
      const inner = measure(data.insides[box], sizes.inner), pad = sizes.pad;
      const title = wide(cut(text(box, NAME))) + sizes.badge * boxes[box][ROLES].length + 3 * pad;
      const side = pad + Math.max(0, title - inner.width - 2 * pad) / 2;
      return {
        left: inner.entry + side, right: inner.width - inner.entry + side, height: sizes.head + inner.height + pad, inner,
      };
    }
    const half = boxes[box][WIDTH] / 2 + (boxes[box][CHIPS].length ? boxes[box][CHIP] + sizes.chipGap : 0);
    return { left: half, right: half, height: sizes.height };
  }

  function measure(inside, distance) {
    const many = inside.items.length;
    const extents = inside.x.map((_, t) => (t < many ? extent(inside.items[t]) : { left: 0, right: 0, height: 0 }));
    const x = inside.x.slice();
    inside.rows.forEach((row) => {
      if (!row.some((t) => t < many && open.has(inside.items[t]))) return;
      const gaps = row.slice(1).map((b, i) => {
        const a = row[i];
        return extents[a].right + extents[b].left + (a < many && b < many ? distance.column : distance.bend);
      });
      const pull = row.map((t) => (t >= many ? 1 : open.has(inside.items[t]) ? 1e6 : 30));
      spread(row.map((t) => inside.x[t]), pull, gaps).forEach((at, i) => { x[row[i]] = at; });
    });
    const left = Math.min(0, ...x.map((at, t) => at - extents[t].left));
    const heights = inside.rows.map((row) => Math.max(0, ...row.map((t) => extents[t].height)));
    const tops = [];
    let top = 0;
    heights.forEach((height, r) => { tops.push(top); top += height + (inside.gaps[r] || 0); });
    const places = x.map((at) => at - left);
    const [way] = inside.ways.filter((t) => t !== null);
    const width = Math.max(...places.map((at, t) => at + extents[t].right));
    return {
      inside, extents, x: places, tops, heights, width, height: top, entry: way === undefined ? width / 2 : places[way],
    };
  }

  // ---- drawing ----

  function make(name, attributes, parent, content) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (content !== undefined) element.textContent = content;
    if (parent) parent.append(element);
    return element;
  }

  const rowOf = (inside) => {
    const row = [];
    inside.rows.forEach((some, r) => some.forEach((t) => { row[t] = r; }));
    return row;
  };

  function route(made, row, stops) {
    const { inside, extents, x, tops, heights } = made;
    const exit = (t) => {
      const inner = extents[t].inner;
      const way = inner ? inner.inside.ways[1] : null;
      return way !== null ? x[t] - inner.entry + inner.x[way] : x[t];
    };
    const bottom = (r) => tops[r] + heights[r];
    let at = exit(stops[0]), y = bottom(row[stops[0]]);
    let path = `M${at} ${tops[row[stops[0]]] + extents[stops[0]].height}V${y}`;
    stops.slice(1).forEach((stop, i) => {
      const top = tops[row[stop]], middle = (y + top) / 2;
      path += x[stop] === at ? `V${top}` : `C${at} ${middle} ${x[stop]} ${middle} ${x[stop]} ${top}`;
      at = x[stop];
      y = top;
      if (i < stops.length - 2) {
        y = bottom(row[stop]);
        path += `V${y}`;
      }
    });
    return stops[stops.length - 1] === inside.ways[1] ? `${path}v${sizes.pad}` : path;
  }

  function drawInside(made, parent, state) {
    const { inside, extents, x, tops } = made;
    const row = rowOf(inside), near = inside.items.map(() => []);
    for (const [source, target, how, ...bends] of inside.edges) {
      const upwards = row[source] > row[target];
      const stops = [source, ...bends, target];
      const path = make("path", { class: `edge ${how}`, d: route(made, row, upwards ? stops.reverse() : stops) }, parent);
      if (target !== inside.ways[1]) path.setAttribute(upwards ? "marker-start" : "marker-end", `url(#tip-${how})`);
      for (const end of [source, target]) if (near[end]) near[end].push(path);
    }
    inside.items.forEach((box, t) => {
      const g = open.has(box)
        ? drawOpen(box, extents[t], x[t], tops[row[t]], parent, state) : drawBox(box, x[t], tops[row[t]], parent);
      g.classList.add("stop");
      g.dataset.box = box;
      g.setAttribute("tabindex", "-1");
      g.setAttribute("aria-label", lines(box).join(". "));
      for (const [event, on] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]]) {
        g.addEventListener(event, () => near[t].forEach((path) => path.classList.toggle("near", on)));
      }
      state.elements.set(box, g);
    });
  }

  function badges(box, x, y, parent) {
    boxes[box][ROLES].forEach((role, i) => {
      make("path", { class: "badge", transform: `translate(${x + sizes.badge * (i + 0.7)} ${y})`, d: glyphs[role] }, parent);
    });
  }

  function drawBox(box, x, y, parent) {
    const [width, height, group] = [boxes[box][WIDTH], sizes.height, isGroup(box)];
    const g = make("g", { class: `box${group ? " group" : ""}`, transform: `translate(${x} ${y})` }, parent);
    const form = group ? "" : text(box, FORM);
    const rx = group ? 8 : form === "input" ? height / 2 : 3;
    if (group) make("rect", { class: "behind", x: 4 - width / 2, y: 4, width, height, rx }, g);
    make("rect", { class: `frame ${form}`, x: -width / 2, y: 0, width, height, rx }, g);
    const shift = (sizes.badge * boxes[box][ROLES].length) / 2;
    make("text", { class: "label", x: -shift, y: 16 }, g, text(box, LABEL));
    make("text", { class: "note", x: 0, y: 30 }, g, text(box, NOTE));
    badges(box, wide(text(box, LABEL)) / 2 - shift, 12, g);
    const chips = boxes[box][CHIPS], broad = boxes[box][CHIP], high = sizes.chip - 2;
    chips.forEach((chip, i) => {
      const left = -width / 2 - sizes.chipGap - broad, top = height / 2 - (sizes.chip * chips.length) / 2 + sizes.chip * i + 1;
      make("path", { class: "stub", d: `M${left + broad} ${top + high / 2}h${sizes.chipGap}` }, g);
      make("rect", { class: "chip", x: left, y: top, width: broad, height: high, rx: 6 }, g);
      make("text", { class: "chip-text", x: left + broad / 2, y: top + high - 3.5 }, g, strings[chip]);
    });
    g.setAttribute("role", group ? "button" : "img");
    if (group) g.setAttribute("aria-expanded", "false");
    return g;
  }

  function drawOpen(box, { left, right, height, inner }, x, y, parent, state) {
    const g = make("g", { transform: `translate(${x - left} ${y})` }, parent);
    make("rect", { class: "room", width: left + right, height, rx: 8 }, g);
    const head = make("g", { class: "head", role: "button", "aria-expanded": "true" }, g);
    make("rect", { class: "bar", width: left + right, height: sizes.head, rx: 8 }, head);
    make("text", { class: "opened", x: sizes.pad, y: 17 }, head, cut(text(box, NAME)));
    badges(box, sizes.pad + wide(cut(text(box, NAME))), 13, head);
    drawInside(inner, make("g", { transform: `translate(${left - inner.entry} ${sizes.head})` }, g), state);
    return head;
  }

  function draw() {
    const state = { elements: new Map(), bands: new Map() };
    const made = measure(data.outer, sizes.outer);
    const inner = Math.max(made.width, 320), full = sizes.gutter + inner + 2 * sizes.margin;
    world.replaceChildren();
    for (const band of strips) {
      const [first, last] = data.outer.bands[band.part];
      const top = made.tops[first] - sizes.bandPad, bottom = made.tops[last] + made.heights[last] + sizes.bandPad;
      state.bands.set(band.part, { top, height: bottom - top });
      make("rect", { class: `band ${band.css}`, x: 0, y: top, width: full, height: bottom - top, rx: 8 }, world);
      make("rect", { class: `strip ${band.css}`, x: 0, y: top, width: 8, height: bottom - top, rx: 3 }, world);
      make("text", { class: "band-title", x: 20, y: top + 22 }, world, band.title);
      band.notes.forEach((note, i) => make("text", { class: "band-note", x: 20, y: top + 39 + 15 * i }, world, note));
      if (band.boundary) {
        const y = made.tops[data.outer.borders[band.part]];
        make("text", { class: "border-text", x: 20, y: y + 3.5 }, world, band.boundary);
        make("path", { class: "border", d: `M${28 + band.boundary.length * sizes.small} ${y}H${full}` }, world);
      }
    }
    const shift = sizes.gutter + sizes.margin + (inner - made.width) / 2;
    const body = make("g", { transform: `translate(${shift} 0)` }, world);
    drawInside(made, body, state);
    const borders = new Set(strips.filter((band) => band.boundary).map((band) => data.outer.borders[band.part]));
    const row = rowOf(data.outer), seen = new Set();
    for (const [, , how, ...bends] of data.outer.edges) {
      for (const bend of how === "lane" ? bends : []) {
        if (!borders.has(row[bend]) || seen.has(bend)) continue;
        seen.add(bend);
        make("path", {
          class: "crossing", transform: `translate(${made.x[bend]} ${made.tops[row[bend]]})`, d: glyphs.lane,
        }, body);
      }
    }
    const order = [...state.elements.keys()];
    drawn = { ...state, order, width: full, height: made.height + 2 * sizes.bandPad };
    setCurrent(drawn.elements.has(current) ? current : order[0]);
  }

  // ---- the view ----

  const apply = () => world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const scale = Math.min(4, Math.max(0.02, view.scale * factor));
    view.x = x - ((x - view.x) * scale) / view.scale;
    view.y = y - ((y - view.y) * scale) / view.scale;
    view.scale = scale;
    apply();
  }

  function show(scale) {
    view.scale = scale;
    view.x = (canvas.clientWidth - drawn.width * scale) / 2;
    view.y = Math.max(12, (canvas.clientHeight - drawn.height * scale) / 2) + sizes.bandPad * scale;
    apply();
  }

  const whole = () => Math.min((canvas.clientWidth - 24) / drawn.width, (canvas.clientHeight - 24) / drawn.height, 1.25);

  function toggle(box) {
    const before = drawn.elements.get(box).getBoundingClientRect();
    if (open.has(box)) open.delete(box); else open.add(box);
    draw();
    const after = drawn.elements.get(box).getBoundingClientRect();
    // what was clicked stays where it is
    view.x += before.left + before.width / 2 - after.left - after.width / 2;
    view.y += before.top - after.top;
    apply();
    if (open.has(box)) {
      const room = drawn.elements.get(box).parentNode.getBoundingClientRect(), outer = canvas.getBoundingClientRect();
      view.y -= Math.max(0, Math.min(room.bottom - outer.bottom + 20, room.top - outer.top - 20));
      apply();
    }
    drawn.elements.get(box).focus({ preventScroll: true });
  }

  function bringIntoView(element) {
    const inner = element.getBoundingClientRect(), outer = canvas.getBoundingClientRect(), edge = 20;
    const move = (low, high, from, to) => (low < from + edge ? from + edge - low : high > to - edge ? to - edge - high : 0);
    view.x += move(inner.left, inner.right, outer.left, outer.right);
    view.y += move(inner.top, inner.bottom, outer.top, outer.bottom);
    apply();
  }

  function setCurrent(box) {
    const old = drawn.elements.get(current);
    if (old) old.setAttribute("tabindex", "-1");
    current = box;
    const now = drawn.elements.get(box);
    if (now) now.setAttribute("tabindex", "0");
  }

  // ---- what a box says ----

  const short = (number) => {
    const units = ["", "k", "M", "G", "T", "P", "E"];
    let power = 0;
    while (number >= 999.95 && power < units.length - 1) { number /= 1000; power += 1; }
    return power ? number.toFixed(1) + units[power] : String(number);
  };

  function reasons(box) {
    if (!isGroup(box)) return boxes[box][REASONS].map((i) => strings[i]);
    const found = new Set();
    for (const item of data.insides[box].items) {
      if (isGroup(item) || boxes[item][ROLES].length) reasons(item).forEach((reason) => found.add(reason));
    }
    return [...found].slice(0, 8);
  }

  function lines(box) {
    const record = boxes[box], group = isGroup(box);
    const work = record[FLOPS] ? `${short(record[FLOPS])} FLOPs` : "";
    const facts = group
      ? [text(box, KIND), `${record[COUNT]} operators`, work]
      : [text(box, OPERATOR), text(box, KIND), text(box, SHAPE), work];
    const reads = group ? [] : record[READS].map((i) => strings[i]);
    return [
      text(box, NAME), facts.filter(Boolean).join(" · "), data.parts[record[PART]],
      ...(reads.length ? [`reads ${reads.join(", ")}`] : []), ...reasons(box),
      ...(group ? [open.has(box) ? "click to close" : "click to open"] : []),
    ];
  }

  function showTip(box, x, y) {
    const [name, ...rest] = lines(box);
    const title = document.createElement("b");
    title.textContent = name;
    tip.replaceChildren(title, ...rest.map((line, i) => {
      const p = document.createElement("p");
      p.textContent = line;
      if (i < 2 || line.startsWith("click to ")) p.className = "dim";
      return p;
    }));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, window.innerWidth - width - 8))}px`;
    tip.style.top = `${Math.max(4, y + 18 + height > window.innerHeight ? y - height - 12 : y + 18)}px`;
  }

  const hideTip = () => { tip.hidden = true; };
  const boxAt = (target) => {
    const stop = target.closest && target.closest(".stop");
    return stop ? Number(stop.dataset.box) : null;
  };

  // ---- what a person does ----

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { left, top } = canvas.getBoundingClientRect();
    const step = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 200 : 1;
    zoom(Math.exp(-Math.max(-240, Math.min(240, event.deltaY * step)) / 400), event.clientX - left, event.clientY - top);
    hideTip();
  }, { passive: false });

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    drag = { x: event.clientX, y: event.clientY, moved: false, box: boxAt(event.target) };
  });
  canvas.addEventListener("pointermove", (event) => {
    const box = boxAt(event.target);
    if (!drag) {
      if (box === null) hideTip(); else showTip(box, event.clientX, event.clientY);
      return;
    }
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    if (!drag.moved) canvas.setPointerCapture(event.pointerId);
    drag.moved = true;
    canvas.classList.add("dragging");
    hideTip();
    view.x += dx;
    view.y += dy;
    Object.assign(drag, { x: event.clientX, y: event.clientY });
    apply();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, () => {
      canvas.classList.remove("dragging");
      const { moved, box } = drag || {};
      drag = null;
      if (name === "pointerup" && moved === false && box !== null) {
        setCurrent(box);
        if (isGroup(box)) { hideTip(); toggle(box); }
      }
    });
  }
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("focusin", (event) => {
    const box = boxAt(event.target);
    if (box === null || !event.target.matches(":focus-visible")) return;
    setCurrent(box);
    bringIntoView(event.target);
    const { left, bottom } = event.target.getBoundingClientRect();
    showTip(box, left, bottom);
  });
  canvas.addEventListener("focusout", hideTip);

  const MOVES = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const box = boxAt(event.target), key = event.key;
    const step = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[key];
    if (key === "+" || key === "=") zoom(1.25);
    else if (key === "-") zoom(0.8);
    else if (key === "0") show(whole());
    else if (key === "Escape") hideTip();
    else if (box !== null && (key === "Enter" || key === " ")) { if (isGroup(box)) toggle(box); }
    else if (box !== null && step) {
      const next = drawn.order[drawn.order.indexOf(box) + step];
      if (next !== undefined) drawn.elements.get(next).focus({ preventScroll: true });
    } else if (key in MOVES) {
      view.x += MOVES[key][0];
      view.y += MOVES[key][1];
      apply();
    } else return;
    event.preventDefault();
  });

  document.getElementById("fit").addEventListener("click", () => show(whole()));
  document.getElementById("closer").addEventListener("click", () => zoom(1.25));
  document.getElementById("farther").addEventListener("click", () => zoom(0.8));
  document.getElementById("close").addEventListener("click", () => { open.clear(); draw(); show(whole()); });
  for (const button of document.querySelectorAll(".balance button")) {
    button.addEventListener("click", () => {
      const band = drawn.bands.get(Number(button.dataset.part));
      if (!band) return;
      view.scale = Math.max(view.scale, Math.min(1, (canvas.clientWidth - 24) / drawn.width));
      view.x = (canvas.clientWidth - drawn.width * view.scale) / 2;
      view.y = 30 - band.top * view.scale;
      apply();
    });
  }

  draw();
  // where the whole would be too small to read, its top comes first
  show(whole() >= 0.75 ? whole() : Math.max(whole(), Math.min(1, (canvas.clientWidth - 24) / drawn.width)));
})();
