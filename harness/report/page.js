// Sorting, filtering and the maps' thumbnails. The page says everything without it; nothing is loaded, nothing is sent.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- filters
  const controls = document.getElementById("controls");
  const boards = all(".board");
  const selects = controls ? all("select", controls) : [];
  const words = document.getElementById("words");

  function filter() {
    const wanted = words.value.trim().toLowerCase();
    let shown = 0;
    for (const board of boards) {
      const fits = selects.every((select) => !select.value || board.dataset[select.dataset.field] === select.value);
      let rows = 0;
      for (const row of all("tbody tr[data-text]", board)) {
        row.hidden = !row.dataset.text.includes(wanted);
        rows += row.hidden ? 0 : 1;
      }
      for (const band of all("tbody", board)) {
        band.hidden = !all("tr[data-text]", band).some((row) => !row.hidden);
      }
      board.hidden = !fits || rows === 0;
      shown += board.hidden ? 0 : 1;
    }
    document.getElementById("shown").value = `${shown} of ${boards.length} boards`;
  }

  if (controls && boards.length) {
    for (const select of selects) {
      if (select.dataset.first && boards.length > 6) select.value = select.dataset.first;
      select.addEventListener("change", filter);
    }
    words.addEventListener("input", filter);
    controls.hidden = false;
    filter();
  }

  // ---- sorting: a head with data-sort is a button; cells carry their value in data-v
  function sort(table, head, place) {
    const rising = head.getAttribute("aria-sort") === "descending";
    for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[place];
      return cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v;
    };
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => row.dataset.text !== undefined);
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured stays below
        const numbers = x - y;
        const order = Number.isNaN(numbers) ? x.localeCompare(y) : numbers;
        return rising ? order : -order;
      });
      for (const row of rows) { row.classList.remove("group"); body.append(row); }
    }
  }
  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, place) => {
      if (head.dataset.sort === undefined) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head, place));
    });
  }

  // ---- links into a folded run open it; a link to a hidden board lifts the filters
  function reveal() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.tagName === "DETAILS") target.open = true;
    if (target.closest(".board[hidden]")) {
      for (const select of selects) select.value = "";
      words.value = "";
      filter();
    }
    target.scrollIntoView();
  }
  addEventListener("hashchange", reveal);
  reveal();

  // ---- feature maps: the nearest image under the pointer, or the next one by arrow keys
  for (const figure of all(".featuremap")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const sheet = figure.querySelector("img.sheet");
    const seen = figure.querySelector(".seen");
    const canvas = seen.querySelector("canvas");
    const text = seen.querySelector("output");
    const maps = all("svg.map", figure);
    const side = data.side, margin = data.margin, inner = side - 2 * margin;
    const places = maps.map((_, m) => data.planes[m].map(([x, y]) => [margin + x * inner, margin + (1 - y) * inner]));
    let current = -1;

    function show(index) {
      current = index;
      maps.forEach((map, m) => {
        const cursor = map.querySelector(".cursor");
        cursor.removeAttribute("visibility");
        cursor.setAttribute("cx", places[m][index][0]);
        cursor.setAttribute("cy", places[m][index][1]);
      });
      const tile = sheet.naturalWidth / data.columns;
      const high = sheet.naturalHeight / Math.ceil(data.labels.length / data.columns);
      canvas.width = tile;
      canvas.height = high;
      const [column, row] = [index % data.columns, Math.floor(index / data.columns)];
      canvas.getContext("2d").drawImage(sheet, column * tile, row * high, tile, high, 0, 0, tile, high);
      text.value = `image ${index + 1} of ${data.labels.length}: ${data.names[index]}`;
    }
    maps.forEach((map, m) => {
      map.tabIndex = 0;
      map.addEventListener("pointermove", (event) => {
        const box = map.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width * side, y = (event.clientY - box.top) / box.height * side;
        let best = -1, least = 400; // within 20 units
        places[m].forEach(([px, py], index) => {
          const distance = (px - x) ** 2 + (py - y) ** 2;
          if (distance < least) [best, least] = [index, distance];
        });
        if (best >= 0 && best !== current) show(best);
      });
      map.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        show((Math.max(current, step > 0 ? -1 : 0) + step + data.labels.length) % data.labels.length);
      });
    });
    seen.hidden = false;
  }
})();
