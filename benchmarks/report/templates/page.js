"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement;
    const ascending = head.ariaSort !== "ascending";
    for (const other of table.querySelectorAll("th")) other.ariaSort = null;
    head.ariaSort = ascending ? "ascending" : "descending";
    const key = (row) => row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [parseFloat(key(a)), parseFloat(key(b))];
      return Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => (ascending ? compare(a, b) : compare(b, a)));
    table.tBodies[0].append(...rows);
  }));
}

document.querySelectorAll(".explorer").forEach((section) => explore(section, JSON.parse(section.querySelector("script").textContent)));

function explore(section, tree) {
  const count = tree.names.length;
  const canvas = section.querySelector("canvas"), card = section.querySelector(".card"), search = section.querySelector("input");
  const context = canvas.getContext("2d");
  const [LEFT, RIGHT, TOP] = [10, 90, 24];
  const order = leaves(), place = new Array(count);
  order.forEach((leaf, position) => { place[leaf] = position; });
  const nodes = joints();
  const tallest = Math.max(tree.merges[count - 2][2], tree.thresholds[0]) * 1.05;
  const images = tree.thumbnails.map(() => null);
  let chosen = -1, first = 0, shown = count, dragged = null;

  const pairs = section.querySelector(".confusable tbody");
  const rows = tree.pairs.map(([a, b, ratio, distance, level]) => element("tr", element("td", chooser(a)), element("td", chooser(b)),
    ...[ratio.toFixed(2), distance.toFixed(3), String(level)].map((text) => element("td", text))));
  pairs.append(...rows);
  section.querySelector(".about").textContent =
    `${tree.title}, ${tree.data}: ${count} classes, average spread ${tree.average_spread.toFixed(3)} (squared distance)`;

  function leaves() {  // in the order in which no lines cross
    const found = [], stack = [2 * count - 2];
    while (stack.length) {
      const node = stack.pop();
      if (node < count) found.push(node);
      else { const [a, b] = tree.merges[node - count]; stack.push(b, a); }
    }
    return found;
  }

  function joints() {  // where each merge stands in the row, and how far it reaches
    const found = [];
    const at = (node) => (node < count ? { y: place[node], x: 0, low: place[node], high: place[node] } : found[node - count]);
    for (const [a, b, height] of tree.merges) {
      const [one, other] = [at(a), at(b)];
      found.push({
        y: (one.y + other.y) / 2, x: height, low: Math.min(one.low, other.low), high: Math.max(one.high, other.high), one, other,
      });
    }
    return found;
  }

  const rowHeight = () => (canvas.clientHeight - TOP) / shown;
  const toY = (position) => TOP + (position - first + 0.5) * rowHeight();
  const toX = (height) => canvas.clientWidth - RIGHT - (height / tallest) * (canvas.clientWidth - RIGHT - LEFT);

  function draw() {
    const scale = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    context.fillStyle = color("--soft");
    context.strokeStyle = color("--line");
    context.setLineDash([2, 4]);
    let label = Infinity;
    tree.thresholds.forEach((threshold, level) => {
      if (threshold > tallest) return;
      const x = toX(threshold);
      line(x, TOP, x, canvas.clientHeight);
      if (label - x > 42) { context.fillText(`${level}: ${threshold.toFixed(2)}`, Math.max(x, 28), 14); label = x; }
    });
    context.setLineDash([]);
    context.strokeStyle = color("--soft");
    context.save();
    context.beginPath();
    context.rect(0, TOP - 4, canvas.clientWidth, canvas.clientHeight);
    context.clip();
    for (const { x, low, high, one, other } of nodes) {
      if (high < first - 1 || low > first + shown || (high - low + 1) * rowHeight() < 1) continue;
      line(toX(x), toY(one.y), toX(x), toY(other.y));
      for (const child of [one, other]) line(toX(child.x), toY(child.y), toX(x), toY(child.y));
    }
    context.restore();
    if (rowHeight() < 9) {
      if (chosen >= 0) mark(color("--accent"));
      return;
    }
    context.textAlign = "left";
    context.textBaseline = "middle";
    for (let position = Math.max(0, Math.floor(first)); position < Math.min(count, first + shown); position++) {
      const leaf = order[position], size = Math.min(rowHeight() - 1, 32), y = toY(position), x = canvas.clientWidth - RIGHT + 4;
      context.fillStyle = leaf === chosen ? color("--accent") : color("--ink");
      const picture = image(leaf);
      if (picture && picture.complete) context.drawImage(picture, x, y - size / 2, size, size);
      context.fillText(tree.names[leaf].slice(0, 14), x + (picture ? size + 5 : 0), y, RIGHT - 8 - (picture ? size + 5 : 0));
    }
    context.textBaseline = "alphabetic";
    if (chosen >= 0) mark(color("--accent"));
  }

  function mark(color) {
    context.fillStyle = color;
    context.beginPath();
    context.arc(canvas.clientWidth - RIGHT, toY(place[chosen]), 4, 0, 7);
    context.fill();
  }

  function line(x0, y0, x1, y1) {
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  }

  function image(leaf) {
    if (leaf >= tree.thumbnails.length) return null;
    if (!images[leaf]) {
      images[leaf] = new Image();
      images[leaf].onload = () => requestAnimationFrame(draw);
      images[leaf].src = tree.thumbnails[leaf];
    }
    return images[leaf];
  }

  function view(start, rows) {
    shown = Math.min(count, Math.max(Math.min(count, 6), rows));
    first = Math.min(count - shown, Math.max(0, start));
    canvas.dataset.first = first.toFixed(2);
    canvas.dataset.shown = shown.toFixed(2);
    draw();
  }

  function zoom(factor, position = chosen >= 0 ? place[chosen] + 0.5 : first + shown / 2) {
    const share = Math.min(1, Math.max(0, (position - first) / shown));
    const rows = Math.min(count, Math.max(Math.min(count, 6), shown / factor));
    view(position - share * rows, rows);
  }

  function choose(leaf, bring = false) {
    chosen = leaf;
    const [near, distances, levels, margins] = tree.nearest[leaf];
    card.replaceChildren();
    const title = element("h3", ...picture(leaf), element("span", tree.names[leaf]));
    const body = element("tbody");
    near.forEach((other, row) => {
      body.append(element("tr", element("td", chooser(other), ...pairLink(leaf, other)), ...[distances[row].toFixed(3), levels[row], margins[row].toFixed(3)].map((v) => element("td", String(v)))));
    });
    const heads = ["nearest", "merge at", "level", "margin"].map((head) => element("th", head));
    card.append(title, element("p", `spread ${tree.spreads[leaf].toFixed(3)}`), element("table", element("thead", element("tr", ...heads)), body));
    if (bring) view(place[leaf] + 0.5 - Math.min(shown, 30) / 2, Math.min(shown, 30));
    else draw();
  }

  function picture(leaf) {
    if (leaf >= tree.thumbnails.length) return [];
    const found = element("img");
    found.src = tree.thumbnails[leaf];
    found.alt = "";
    return [found];
  }

  function chooser(leaf) {  // a button that shows a class in the tree
    const button = element("button", ...picture(leaf), element("span", tree.names[leaf]));
    button.type = "button";
    button.addEventListener("click", () => {
      choose(leaf, true);
      if (pairs.contains(button)) canvas.focus();  // which brings the tree into view
    });
    return button;
  }

  function pairLink(leaf, other) {  // to the row of two classes among those told apart least
    const row = tree.pairs.findIndex(([a, b]) => (a === leaf && b === other) || (b === leaf && a === other));
    if (row < 0) return [];
    const button = element("button", `pair ${row + 1}`);
    button.type = "button";
    button.className = "pair";
    button.addEventListener("click", () => rows[row].querySelector("button").focus());
    return [button];
  }

  function element(name, ...children) {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, first + (event.offsetY - TOP) / rowHeight());
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    dragged = { y: event.offsetY, first, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!dragged) return;
    dragged.moved ||= Math.abs(event.offsetY - dragged.y) > 4;
    if (dragged.moved) view(dragged.first - (event.offsetY - dragged.y) / rowHeight(), shown);
  });
  canvas.addEventListener("pointerup", (event) => {
    const position = Math.floor(first + (event.offsetY - TOP) / rowHeight());
    if (dragged && !dragged.moved && position >= 0 && position < count) choose(order[position]);
    dragged = null;
  });
  canvas.addEventListener("keydown", (event) => {
    const act = {
      "+": () => zoom(1.5), "-": () => zoom(1 / 1.5), ArrowDown: () => view(first + shown / 8, shown), ArrowUp: () => view(first - shown / 8, shown),
      Home: () => view(0, shown), End: () => view(count, shown),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  for (const button of section.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => (button.dataset.zoom === "0" ? view(0, count) : zoom(Number(button.dataset.zoom))));
  }
  search.addEventListener("input", () => {
    const wanted = search.value.trim();
    if (!wanted) return;
    let found = tree.names.indexOf(wanted);
    if (found < 0) found = tree.names.findIndex((name) => name.toLowerCase().includes(wanted.toLowerCase()));
    if (found >= 0) choose(found, true);
    search.setAttribute("aria-invalid", String(found < 0));
  });
  new ResizeObserver(() => draw()).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  choose(order[0]);
  view(0, count);
}
