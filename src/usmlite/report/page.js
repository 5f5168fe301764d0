"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const boxes = [...document.querySelectorAll('#runs input[type="checkbox"]')];
  const rows = data.rows.map(({ keys, values }) =>
    values.map((row) => Object.fromEntries(keys.map((key, at) => [key, row[at]]))));
  const figures = new Map(data.figures.map((figure) => {
    const datasets = Object.fromEntries(Object.entries(figure.data).map(([name, at]) => [name, rows[at]]));
    const spec = { ...figure.spec, datasets };
    return [figure.key, { ...figure, spec, rows: rows[figure.rows], chosen: {}, view: null }];
  }));

  // Numbers as Python wrote them elsewhere on the page.
  const formats = {
    "": (value) => (value === true ? "yes" : value === false ? "no" : value ?? ""),
    ",d": (value) => Math.round(value).toLocaleString("en"),
  };
  const written = (value, form) => {
    if (value === null || value === undefined || form in formats) return (formats[form] ?? formats[""])(value);
    const digits = Number(form.slice(1, -1));
    const kind = form.at(-1);
    if (kind === "f") return value.toFixed(digits);
    if (kind === "%") return `${(100 * value).toFixed(digits)} %`;
    return String(Number(value.toPrecision(digits)));
  };

  const shown = () => boxes.filter((box) => box.checked).map((box) => box.value);

  const rowsOf = (figure) => {
    const kept = new Set(shown());
    return figure.rows.filter((row) => {
      if ("run" in figure.chosen) { if (row.run !== figure.chosen.run) return false; }
      else if (data.runs.includes(row.run) && !kept.has(row.run)) return false;
      return Object.entries(figure.chosen).every(([name, value]) =>
        name === "run" || name === "layer" || !(name in row) || row[name] === value);
    });
  };

  const drawTable = (details) => {
    const figure = figures.get(details.dataset.figure);
    if (!details.open) return;
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const column of figure.columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = column.title;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of rowsOf(figure)) {
      const line = body.insertRow();
      for (const column of figure.columns) line.insertCell().textContent = written(row[column.key], column.form);
    }
    details.querySelector(".scroll").replaceChildren(table);
  };

  const dark = () => root.dataset.theme === "dark";

  const draw = async (figure) => {
    const place = document.getElementById(`plot-${figure.key}`);
    const height = place.offsetHeight;
    place.style.minHeight = `${height}px`; // what is below must not jump
    figure.view?.finalize();
    const result = await vegaEmbed(place, figure.spec, {
      actions: false,
      ast: true, // no code is made from text, so that the page's policy can forbid it
      config: data.themes[dark() ? "dark" : "light"].config,
      renderer: "svg",
      tooltip: { theme: dark() ? "dark" : "light" },
    });
    figure.view = result.view;
    const svg = place.querySelector("svg");
    svg.setAttribute("aria-label", `${figure.title}. ${figure.summary} The table below has the same numbers.`);
    await update(figure);
    place.style.minHeight = "";
  };

  const update = async (figure) => {
    if (!figure.view) return;
    figure.view.signal("shown", shown());
    for (const [name, value] of Object.entries(figure.chosen)) figure.view.signal(name, value);
    await figure.view.runAsync();
  };

  const save = async (figure, ending) => {
    const link = document.createElement("a");
    link.href = await figure.view.toImageURL(ending, ending === "png" ? 3 : 1);
    link.download = `${figure.key}.${ending}`;
    link.click();
  };

  const colorSwatches = () => {
    const colors = data.themes[dark() ? "dark" : "light"].colors;
    for (const swatch of document.querySelectorAll("[data-color]"))
      swatch.style.background = colors[Number(swatch.dataset.color) % colors.length];
  };

  const tellCount = () => {
    document.getElementById("told").textContent = boxes.length > 1 ? `${shown().length} of ${boxes.length} shown` : "";
  };

  const showCards = () => {
    const select = document.getElementById("worst-of");
    if (!select) return;
    const kept = new Set(shown());
    let count = 0;
    for (const card of document.querySelectorAll(".card")) {
      const owners = JSON.parse(card.dataset.worst);
      card.hidden = select.value ? !owners.includes(select.value) : !owners.some((name) => kept.has(name));
      count += card.hidden ? 0 : 1;
      for (const line of card.querySelectorAll("[data-runs]")) {
        const visible = (name) => !data.runs.includes(name) || kept.has(name) || name === select.value;
        line.hidden = !JSON.parse(line.dataset.runs).some(visible);
        line.nextElementSibling.hidden = line.hidden;
      }
    }
    document.getElementById("worst-told").textContent = `${count} utterances`;
  };

  const filter = () => {
    const kept = new Set(shown());
    for (const row of document.querySelectorAll("#runs tr[data-run]"))
      row.classList.toggle("dimmed", !kept.has(row.dataset.run));
    tellCount();
    showCards();
    document.querySelectorAll("details.data").forEach(drawTable);
    return Promise.all([...figures.values()].map(update));
  };

  const setTheme = (name) => {
    root.dataset.theme = name;
    const button = document.getElementById("theme");
    button.setAttribute("aria-pressed", String(name === "dark"));
    colorSwatches();
  };

  const drawAll = async () => {
    for (const figure of figures.values()) await draw(figure);
  };

  for (const box of boxes) box.addEventListener("change", filter);
  for (const button of document.querySelectorAll("[data-show]"))
    button.addEventListener("click", () => {
      const what = button.dataset.show;
      for (const box of boxes) box.checked = what === "all" || (what === "front" && "front" in box.dataset);
      filter();
    });
  for (const select of document.querySelectorAll("select[data-signal]")) {
    const figure = figures.get(select.dataset.figure);
    const set = () => { figure.chosen[select.dataset.signal] = select.value; };
    set();
    select.addEventListener("change", () => {
      set();
      update(figure);
      const details = document.querySelector(`details.data[data-figure="${CSS.escape(figure.key)}"]`);
      drawTable(details);
    });
  }
  for (const details of document.querySelectorAll("details.data")) details.addEventListener("toggle", () => drawTable(details));
  for (const button of document.querySelectorAll("button[data-save]"))
    button.addEventListener("click", () => save(figures.get(button.dataset.figure), button.dataset.save));
  document.getElementById("worst-of")?.addEventListener("change", showCards);
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(dark() ? "light" : "dark");
    drawAll();
  });

  const wanted = matchMedia("(prefers-color-scheme: dark)");
  setTheme(wanted.matches ? "dark" : "light");
  wanted.addEventListener("change", () => { setTheme(wanted.matches ? "dark" : "light"); drawAll(); });
  tellCount();
  showCards();
  drawAll().then(() => { root.dataset.drawn = String(Math.round(performance.now())); });
})();
