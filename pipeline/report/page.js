// Tables that sort and filter, figures with their data, copies of commands, light and dark.
"use strict";
(() => {
  const settings = JSON.parse(document.getElementById("settings").textContent);
  const said = document.getElementById("said");

  // Light and dark. Remembered where the browser lets a page remember; works where it does not.
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  const remember = (name) => {
    try {
      if (name) localStorage.setItem("layerbank-theme", name);
      return localStorage.getItem("layerbank-theme");
    } catch {
      return null;
    }
  };
  const remembered = remember();
  if (remembered) document.documentElement.dataset.theme = remembered;
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    remember(document.documentElement.dataset.theme);
    showTheme();
  });
  system.addEventListener("change", showTheme);
  showTheme();

  // Tables.
  const key = (row, column, numeric) => {
    const value = row.cells[column].dataset.value;
    if (value === undefined) return null;
    return numeric ? Number(value) : value;
  };
  const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  const sort = (table, header) => {
    const down = header.getAttribute("aria-sort") === "ascending";
    const numeric = header.classList.contains("number");
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row, header.cellIndex, numeric), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is not there comes last
      return down ? order(b, a) : order(a, b);
    });
    body.append(...rows.map(([, row]) => row));
    said.textContent = `sorted by ${header.textContent}, ${down ? "descending" : "ascending"}`;
  };
  const sortable = (table) => {
    for (const header of table.tHead.rows[0].cells)
      header.querySelector("button")?.addEventListener("click", () => sort(table, header));
  };
  for (const box of document.querySelectorAll(".table")) {
    const table = box.querySelector("table");
    const rows = [...table.tBodies[0].rows];
    const texts = rows.map((row) =>
      [...row.cells].filter((cell) => !cell.classList.contains("how")).map((cell) => cell.textContent)
        .join(" ").toLowerCase());
    const input = box.querySelector("input");
    sortable(table);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let n = 0;
      rows.forEach((row, k) => {
        row.hidden = !words.every((word) => texts[k].includes(word));
        n += !row.hidden;
      });
      const all = `${rows.length} row${rows.length === 1 ? "" : "s"}`;
      box.querySelector("output").textContent = words.length ? `${n} of ${all}` : all;
    });
  }

  // Copies.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  for (const button of document.querySelectorAll("button.copy"))
    button.addEventListener("click", async () => {
      await copy(button.closest(".how").querySelector("code").textContent);
      button.focus();
      said.textContent = "command copied";
      button.firstChild.textContent = "Copied";
      setTimeout(() => { button.firstChild.textContent = "Copy"; }, 1500);
    });

  // Figures. `ast`: Vega reads its expressions itself, as the page's policy forbids making code of text.
  const options = (config) =>
    ({ ast: true, actions: false, renderer: "svg", defaultStyle: false, config,
       tooltip: { disableDefaultStyle: true } });
  const NARROW = 560, AROUND = 260; // pixels; what stands beside the area that is drawn on
  const fitted = (chart, room) => {
    if (chart.width === undefined) return chart; // of several views: it scales as a picture
    return { ...chart, width: Math.min(chart.width + AROUND, room),
             autosize: { type: "fit-x", contains: "padding" } };
  };
  const narrowed = (config, room) =>
    room >= NARROW ? config
      : { ...config,
          legend: { ...config.legend, orient: "bottom", columns: 2, labelLimit: room / 2 - 50,
                    layout: { bottom: { anchor: "start", direction: "vertical" } } } };
  const rowsOf = (chart) => chart.data?.values ?? Object.values(chart.datasets ?? {})[0] ?? [];
  const charts = [...document.querySelectorAll("figure")].map((figure) =>
    ({ figure, box: figure.querySelector(".chart"),
       chart: JSON.parse(figure.querySelector("script").textContent) }));
  const draw = async (one) => {
    const room = Math.floor(one.figure.clientWidth);
    if (one.room === room) return;
    one.room = room;
    one.view?.finalize();
    one.view = await vegaEmbed(one.box, fitted(one.chart, room), options(narrowed(settings.page, room)));
  };
  const drawAll = async () => {
    for (const one of charts) await draw(one);
    document.documentElement.dataset.drawn = "true";
  };
  let waiting;
  new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  }).observe(document.getElementById("content"));

  const save = async ({ figure, chart }, kind) => {
    const made = await vegaEmbed(document.createElement("div"), chart, options(settings.paper));
    const link = document.createElement("a");
    link.href = await made.view.toImageURL(kind, 2);
    link.download = `${figure.dataset.name}.${kind}`;
    link.click();
    made.finalize();
    said.textContent = `${link.download} saved`;
  };
  const fill = (details, rows) => {
    const box = document.createElement("div");
    const table = document.createElement("table");
    const names = [...new Set(rows.flatMap(Object.keys))];
    const head = table.createTHead().insertRow();
    for (const name of names) {
      const header = document.createElement("th");
      header.scope = "col";
      header.textContent = name;
      head.append(header);
    }
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const name of names) line.insertCell().textContent = row[name] ?? "";
    }
    box.className = "box";
    box.tabIndex = 0;
    box.role = "region";
    box.ariaLabel = details.querySelector("summary").textContent;
    box.append(table);
    details.append(box);
  };
  for (const one of charts) {
    for (const button of one.figure.querySelectorAll("button.save"))
      button.addEventListener("click", () => save(one, button.dataset.kind));
    const details = one.figure.querySelector("details");
    details.addEventListener("toggle", () => fill(details, rowsOf(one.chart)), { once: true });
  }
})();
