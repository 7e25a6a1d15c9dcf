// Draws the latent map from the page's own data: points coloured by a choice, contours of clusters, misclassified test cells.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const plot = document.getElementById("map-plot");
  const controls = document.getElementById("map-controls");
  const { points, names } = data;
  const escapeText = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const hasWebgl = (() => {
    try {
      const canvas = document.createElement("canvas");
      return Boolean(canvas.getContext("webgl"));
    } catch {
      return false;
    }
  })();
  const pointType = hasWebgl ? "scattergl" : "scatter";
  const words = { ctc: "CTC", non_ctc: "non-CTC", unsure: "unsure", artefact: "artefact" };
  const fixed = {
    label: { ctc: "#D55E00", non_ctc: "#0072B2", artefact: "#CC79A7", unsure: "#E69F00" },
    role: { pretrain: "#9AA0A6", train: "#0072B2", validation: "#56B4E9", test: "#E69F00", final: "#009E73" },
  };
  const errorKinds = {
    false_negative: { name: "called non-CTC (label: CTC)", colour: "#1F3FD1", light: "#8FA6FF" },
    false_positive: { name: "called CTC (label: non-CTC)", colour: "#B3123C", light: "#FF8FA6" },
  };
  const nameOf = (column, index) => (points[column][index] === null ? null : names[column][points[column][index]]);
  const hover = points.id.map((id, index) => {
    const label = nameOf("label", index);
    const probability = points.probability[index];
    return [
      `<b>${escapeText(nameOf("cluster", index))}</b>`,
      `patient ${escapeText(nameOf("patient", index))} (${escapeText(nameOf("role", index) ?? "no role")})`,
      `probability ${probability === null ? "unknown" : probability.toFixed(3)}`,
      label === null ? "not labelled" : `label: ${escapeText(words[label] ?? label)}`,
      `cell ${escapeText(id)}`,
    ].join("<br>");
  });
  const all = points.id.map((_, index) => index);
  const pick = (column, rows) => rows.map((index) => column[index]);
  const trace = (name, rows, marker, extra = {}) => ({
    type: pointType, mode: "markers", name, x: pick(points.x, rows), y: pick(points.y, rows), text: pick(hover, rows),
    hovertemplate: "%{text}<extra></extra>", marker, ...extra,
  });
  const size = all.length > 8000 ? 3.5 : 5;

  function colouredPoints(column) {
    if (column === "probability") {
      const known = all.filter((index) => points.probability[index] !== null);
      const unknown = all.filter((index) => points.probability[index] === null);
      const marker = {
        size, color: pick(points.probability, known), cmin: 0, cmax: 1, colorscale: "Cividis",
        colorbar: { title: { text: "probability" }, thickness: 12, len: 0.5, y: 0.25, outlinewidth: 0 },
      };
      const traces = [trace("classified", known, marker, { showlegend: false })];
      return unknown.length ? [trace("not classified", unknown, { size, color: "#9AA0A6", opacity: 0.4 }), ...traces] : traces;
    }
    const groups = names[column].map((name, value) => [name, all.filter((index) => points[column][index] === value)]);
    const rest = all.filter((index) => points[column][index] === null);
    const colourOf = (name, value) => {
      if (column === "cluster") return data.clusterColours[value];
      return fixed[column]?.[name] ?? data.palette[value % data.palette.length];
    };
    const traces = groups.map(([name, rows], value) =>
      trace(escapeText(words[name] ?? name), rows, { size, color: colourOf(name, value), opacity: name === "Background" ? 0.35 : 0.7 }));
    if (rest.length) traces.unshift(trace(column === "label" ? "not labelled" : "none", rest, { size, color: "#9AA0A6", opacity: 0.3 }));
    return traces;
  }

  function outlines() {
    const seen = new Set();
    return data.outlines.map((line) => {
      const first = !seen.has(line.name);
      seen.add(line.name);
      return {
        type: "scatter", mode: "lines", name: `outline of ${line.name.toLowerCase()}`, legendgroup: line.name, showlegend: false,
        x: line.x, y: line.y, hoverinfo: "skip", line: { color: line.colour, width: 2.5 }, meta: first,
      };
    });
  }

  function errors(isDark) {
    if (!controls.elements.errors.checked) return [];
    return names.error.map((kind, value) => {
      const rows = all.filter((index) => points.error[index] === value);
      const style = errorKinds[kind];
      return trace(style.name, rows, { size: 9, symbol: kind === "false_negative" ? "x" : "cross", color: isDark ? style.light : style.colour,
        line: { width: 1, color: isDark ? "#14171a" : "#ffffff" } });
    });
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function draw() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const narrow = plot.clientWidth < 640;
    const axis = { showgrid: false, zeroline: false, ticks: "", showticklabels: false, linecolor: colour("--rule"), mirror: true, showline: true };
    const layout = {
      paper_bgcolor: colour("--panel"), plot_bgcolor: colour("--panel"), font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
      margin: { l: 34, r: 14, t: 14, b: 34 }, hovermode: "closest", dragmode: narrow ? "pan" : "zoom", uirevision: "map",
      xaxis: { ...axis, title: { text: "UMAP dimension 1" } }, yaxis: { ...axis, title: { text: "UMAP dimension 2" }, scaleanchor: narrow ? undefined : "x" },
      legend: narrow ? { orientation: "h", y: -0.2, font: { size: 11 } } : { itemsizing: "constant", bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: { align: "left", bgcolor: colour("--panel"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
    };
    const column = controls.elements.colour.value;
    const traces = [...colouredPoints(column), ...outlines(), ...errors(dark.matches)];
    const config = { responsive: true, displaylogo: false, scrollZoom: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
    Plotly.react(plot, traces, layout, config).then(() => { plot.dataset.drawn = String(all.length); });
  }
  controls.addEventListener("change", draw);
  controls.addEventListener("submit", (event) => event.preventDefault());
  dark.addEventListener("change", draw);
  draw();
})();
