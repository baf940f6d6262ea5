document.querySelectorAll(".map").forEach((section) => chart(section, JSON.parse(section.querySelector("script").textContent)));

function chart(section, found) {
  const { pictures, map } = found, count = map.pictures.length, GRID = 1000;
  const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888"];  // Okabe and Ito
  const SHAPES = 4;
  const canvas = section.querySelector("canvas"), card = section.querySelector(".card"), tip = section.querySelector(".tip");
  const context = canvas.getContext("2d");
  const choices = Object.fromEntries([...section.querySelectorAll("select")].map((select) => [select.dataset.choice, select]));
  const images = new Array(pictures.length).fill(null);
  let view = { x: GRID / 2, y: GRID / 2, width: GRID * 1.08 }, chosen = -1, dragged = null;

  for (const gallery of section.parentElement.querySelectorAll(`#retrievals-${section.id.split("-")[1]} [data-picture]`)) {
    gallery.src = pictures[gallery.dataset.picture][0];
  }
  fill("method", Object.keys(map.methods));
  fill("projection", Object.keys(map.methods[choices.method.value].points));
  colors();
  section.querySelector(".about").textContent = `${found.title}: ${count} images of ${map.names.length} test classes.`;

  function fill(choice, names, kept = choices[choice].value) {
    choices[choice].replaceChildren(...names.map((name) => Object.assign(document.createElement("option"), { textContent: name, value: name })));
    if (names.includes(kept)) choices[choice].value = kept;
  }

  function colors() {  // levels at which some classes have met, but not all
    const { nodes, thresholds } = map.methods[choices.method.value];
    const names = ["class"];
    nodes.forEach((node, level) => {
      const groups = new Set(node).size;
      if (groups > 1 && groups < map.names.length) names.push(`node of level ${level} (below ${thresholds[level].toFixed(2)}: ${groups})`);
    });
    const level = choices.color.value.match(/level \d+/);
    fill("color", names, level ? names.find((name) => name.includes(`${level[0]} `)) : "class");
  }

  const points = () => map.methods[choices.method.value].points[choices.projection.value];
  const group = () => {
    const level = choices.color.value.match(/level (\d+)/);
    const nodes = level ? map.methods[choices.method.value].nodes[level[1]] : null;
    return (place) => (nodes ? nodes[map.classes[place]] : map.classes[place]);
  };
  const scale = () => Math.min(canvas.clientWidth, canvas.clientHeight) / view.width;
  const toX = ([x]) => (x - view.x) * scale() + canvas.clientWidth / 2;
  const toY = ([, y]) => (view.y - y) * scale() + canvas.clientHeight / 2;

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
    const of = group(), size = Math.min(24, 5 * GRID / view.width);
    const inside = [];
    points().forEach((point, place) => {
      const [x, y] = [toX(point), toY(point)];
      if (x > -20 && y > -20 && x < canvas.clientWidth + 20 && y < canvas.clientHeight + 20) inside.push([place, x, y]);
    });
    const asImages = inside.length <= 250;
    for (const [place, x, y] of inside) {
      const number = of(place), color = COLORS[number % COLORS.length];
      context.globalAlpha = chosen < 0 || of(place) === of(chosen) ? 1 : 0.25;
      const picture = asImages ? image(place) : null;
      if (picture && picture.complete) {
        const side = Math.max(20, size * 1.6);
        context.drawImage(picture, x - side / 2, y - side / 2, side, side);
        context.strokeStyle = color;
        context.lineWidth = 2;
        context.strokeRect(x - side / 2, y - side / 2, side, side);
      } else shape(Math.floor(number / COLORS.length) % SHAPES, x, y, Math.max(3, size / 2), color);
      if (place === chosen) {
        context.strokeStyle = accent;
        context.lineWidth = 4;
        context.beginPath();
        context.arc(x, y, 30, 0, 7);
        context.stroke();
      }
    }
    context.globalAlpha = 1;
    Object.assign(canvas.dataset, { width: view.width.toFixed(1), x: view.x.toFixed(1), y: view.y.toFixed(1), inside: inside.length });
  }

  function shape(kind, x, y, radius, color) {
    context.fillStyle = color;
    context.beginPath();
    if (kind === 0) context.arc(x, y, radius, 0, 7);
    else if (kind === 1) context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
    else {
      const corners = kind === 2 ? [-90, 30, 150] : [-90, 0, 90, 180];
      corners.forEach((degrees) => context.lineTo(x + 1.3 * radius * Math.cos(degrees * Math.PI / 180), y + 1.3 * radius * Math.sin(degrees * Math.PI / 180)));
    }
    context.fill();
  }

  function image(place) {
    const picture = map.pictures[place];
    if (!images[picture]) {
      images[picture] = new Image();
      images[picture].onload = () => requestAnimationFrame(draw);
      images[picture].src = pictures[picture][0];
    }
    return images[picture];
  }

  function look(x, y, width) {
    view = { x: Math.min(GRID, Math.max(0, x)), y: Math.min(GRID, Math.max(0, y)), width: Math.min(GRID * 1.08, Math.max(GRID / 60, width)) };
    tip.hidden = true;
    draw();
  }

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const width = Math.min(GRID * 1.08, Math.max(GRID / 60, view.width / factor)), change = (1 / scale()) * (1 - width / view.width);
    look(view.x + (x - canvas.clientWidth / 2) * change, view.y - (y - canvas.clientHeight / 2) * change, width);
  }

  function nearest(x, y, within) {
    let best = -1, least = within * within;
    points().forEach((point, place) => {
      const square = (toX(point) - x) ** 2 + (toY(point) - y) ** 2;
      if (square < least) [best, least] = [place, square];
    });
    return best;
  }

  function choose(place) {
    chosen = place;
    card.replaceChildren(...(place < 0 ? ["No image is chosen."] : []));
    if (place >= 0) {
      const own = map.classes[place], title = document.createElement("h3"), all = document.createElement("p");
      title.append(thumb(place), document.createElement("span"));
      title.lastChild.textContent = map.names[own];
      map.classes.forEach((label, other) => { if (label === own) all.append(thumb(other)); });
      const level = choices.color.value.match(/level (\d+)/);
      card.append(title, `${all.children.length} images of this class are on the map.`, all);
      if (level) {
        const of = group(), names = [...new Set(map.classes.filter((_, other) => of(other) === of(place)))].map((label) => map.names[label]);
        card.append(Object.assign(document.createElement("p"), { textContent: `In its node: ${names.join(", ")}` }));
      }
    }
    draw();
  }

  function thumb(place) {
    return Object.assign(document.createElement("img"), { src: pictures[map.pictures[place]][0], alt: "" });
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    dragged = { x: event.offsetX, y: event.offsetY, view, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged) {
      dragged.moved ||= Math.hypot(event.offsetX - dragged.x, event.offsetY - dragged.y) > 4;
      if (dragged.moved) look(dragged.view.x - (event.offsetX - dragged.x) / scale(), dragged.view.y + (event.offsetY - dragged.y) / scale(), view.width);
      return;
    }
    const place = nearest(event.offsetX, event.offsetY, 14);
    tip.hidden = place < 0;
    if (place < 0) return;
    tip.replaceChildren(thumb(place), map.names[map.classes[place]]);
    tip.style.left = `${event.pageX + 14}px`;
    tip.style.top = `${event.pageY + 14}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("pointerup", (event) => {
    if (dragged && !dragged.moved) choose(nearest(event.offsetX, event.offsetY, 20));
    dragged = null;
  });
  canvas.addEventListener("keydown", (event) => {
    const step = view.width / 8;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (moves[event.key]) look(view.x + moves[event.key][0], view.y + moves[event.key][1], view.width);
    else if (event.key === "+" || event.key === "=") zoom(1.6);
    else if (event.key === "-") zoom(0.625);
    else if (event.key === "0") look(GRID / 2, GRID / 2, Infinity);
    else if (event.key === "Enter") choose(nearest(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity));
    else if (event.key === "Escape") choose(-1);
    else return;
    event.preventDefault();
  });
  section.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
    const factor = Number(button.dataset.zoom);
    if (factor) zoom(factor);
    else look(GRID / 2, GRID / 2, Infinity);
  }));
  section.querySelector("input").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    if (!wanted) return choose(-1);
    const exact = map.names.findIndex((name) => name.toLowerCase() === wanted);
    const label = exact >= 0 ? exact : map.names.findIndex((name) => name.toLowerCase().includes(wanted));
    if (label < 0) return;
    const place = map.classes.indexOf(label);
    choose(place);
    look(...points()[place], Math.min(view.width, GRID / 2));
  });
  choices.method.addEventListener("change", () => {
    fill("projection", Object.keys(map.methods[choices.method.value].points));
    colors();
    choose(chosen);
  });
  for (const choice of ["projection", "color"]) choices[choice].addEventListener("change", () => choose(chosen));
  choose(-1);
  new ResizeObserver(draw).observe(canvas);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
