// Draws the plots described in the data block. Knows nothing of any one report, so that its hash
// in the content security policy stays the same for all.
"use strict";
(function () {
  const plots = JSON.parse(document.getElementById("plot-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = {};
  let printing = false;

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    // While printing, the light colours: custom properties still hold those of the screen.
    const prefix = printing || !dark.matches ? "--light-" : "--dark-";
    return {
      text: value(prefix + "text"),
      grid: value(prefix + "grid"),
      card: value(prefix + "card"),
      colour: (i) => value(prefix + "c" + i),
    };
  }

  function coloured(node, t) {
    if (Array.isArray(node) || node === null || typeof node !== "object") return node;
    const copy = {};
    for (const key of Object.keys(node)) {
      if (key === "c") copy.color = t.colour(node.c);
      else copy[key] = coloured(node[key], t);
    }
    return copy;
  }

  function draw(plot) {
    const box = document.getElementById(plot.id);
    const t = theme();
    const axis = plot.axes && plot.axes[chosen[plot.id] || 0];
    const data = plot.data.map(function (trace, i) {
      const copy = coloured(trace, t);
      if (axis) copy.x = axis.xs[i];
      return copy;
    });
    if (axis) {
      const front = { type: "scatter", mode: "lines", x: axis.front.x, y: axis.front.y };
      front.line = { shape: "hv", width: 1, dash: "dot", color: t.text };
      data.unshift(Object.assign(front, { hoverinfo: "skip" }));
    }
    const line = { gridcolor: t.grid, linecolor: t.grid, zerolinecolor: t.grid, automargin: true };
    const layout = Object.assign({}, plot.layout);
    layout.xaxis = Object.assign({}, line, layout.xaxis);
    layout.yaxis = Object.assign({}, line, layout.yaxis);
    if (axis) {
      layout.xaxis.title = { text: axis.title };
      layout.xaxis.type = axis.log ? "log" : "linear";
      layout.xaxis.rangemode = "tozero";
    }
    Object.assign(layout, {
      height: plot.height,
      margin: { l: 8, r: 12, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: t.text, family: "system-ui, sans-serif", size: 12 },
      hoverlabel: { bgcolor: t.card, bordercolor: t.grid, font: { color: t.text }, align: "left" },
      showlegend: false,
      dragmode: false,
    });
    if (!layout.hovermode) layout.hovermode = "closest";
    Plotly.react(box, data, layout, { displayModeBar: false, responsive: true });
  }

  function drawAll() {
    plots.forEach(draw);
  }

  plots.forEach(function (plot) {
    const select = document.getElementById(plot.id + "-axis");
    if (!select) return;
    select.addEventListener("change", function () {
      chosen[plot.id] = Number(select.value);
      draw(plot);
    });
  });
  dark.addEventListener("change", drawAll);
  window.addEventListener("beforeprint", function () {
    printing = true;
    drawAll();
  });
  window.addEventListener("afterprint", function () {
    printing = false;
    drawAll();
  });
  drawAll();
})();
