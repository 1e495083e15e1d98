// Draws the plots described in the data block, each when it comes near the window.
"use strict";
(function () {
  const plots = JSON.parse(document.getElementById("plot-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = {};
  const drawn = new Set();
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
      if (key === "c") copy.color = Array.isArray(node.c) ? node.c.map(t.colour) : t.colour(node.c);
      else copy[key] = coloured(node[key], t);
    }
    return copy;
  }

  // Upright lines where two stems cross, each in its interval.
  function crossings(layout, axis, t) {
    const upright = { type: "rect", yref: "paper", y0: 0, y1: 1, layer: "below" };
    layout.shapes = axis.crossings.flatMap(function (crossing) {
      const line = { x0: crossing.x, x1: crossing.x, line: { color: t.text, width: 1 } };
      const [x0, x1] = crossing.interval || [crossing.x, crossing.x];
      const band = { x0, x1, line: { width: 0 }, fillcolor: t.text, opacity: 0.08 };
      return [Object.assign(band, upright), Object.assign(line, upright, { type: "line" })];
    });
    layout.annotations = axis.crossings.map((crossing) => ({
      x: axis.log ? Math.log10(crossing.x) : crossing.x, // unlike shapes, in the axis' own units
      y: 1,
      yref: "paper",
      xanchor: "left",
      yanchor: "top",
      align: "left",
      text: crossing.text,
      showarrow: false,
    }));
  }

  function draw(plot) {
    const box = document.getElementById(plot.id);
    const t = theme();
    const axis = plot.axes && plot.axes[chosen[plot.id] || 0];
    const layout = Object.assign({}, plot.layout);
    const data = plot.data.map(function (trace, i) {
      const copy = coloured(trace, t);
      if (axis) copy.x = axis.xs[i];
      return copy;
    });
    if (axis) {
      const front = { type: "scatter", mode: "lines", x: axis.front.x, y: axis.front.y };
      front.line = { shape: "hv", width: 1, dash: "dot", color: t.text };
      data.unshift(Object.assign(front, { hoverinfo: "skip" }));
      layout.xaxis = { title: { text: axis.title }, type: axis.log ? "log" : "linear" };
      Object.assign(layout.xaxis, { rangemode: "tozero", nticks: box.clientWidth < 500 ? 4 : 9 });
      crossings(layout, axis, t);
    }
    const line = { gridcolor: t.grid, linecolor: t.grid, zerolinecolor: t.grid, automargin: true };
    layout.xaxis = Object.assign({}, line, layout.xaxis);
    layout.yaxis = Object.assign({}, line, layout.yaxis);
    Object.assign(layout, {
      height: plot.height,
      margin: { l: 8, r: 20, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: t.text, family: "system-ui, sans-serif", size: 12 },
      hoverlabel: { bgcolor: t.card, bordercolor: t.grid, font: { color: t.text }, align: "left" },
      showlegend: false,
      dragmode: false,
      hovermode: "closest",
    });
    Plotly.react(box, data, layout, { displayModeBar: false, responsive: true });
    drawn.add(plot);
    // Plotly's drawing outside of the window, by which it measures texts.
    document.getElementById("js-plotly-tester").setAttribute("aria-hidden", "true");
  }

  const near = new IntersectionObserver(
    function (entries) {
      entries.filter((entry) => entry.isIntersecting).forEach(function (entry) {
        near.unobserve(entry.target);
        const plot = plots.find((one) => one.id === entry.target.id);
        if (!drawn.has(plot)) draw(plot);
      });
    },
    { rootMargin: "400px" }
  );

  plots.forEach(function (plot) {
    const box = document.getElementById(plot.id);
    box.style.minHeight = plot.height + "px";
    near.observe(box);
    const select = document.getElementById(plot.id + "-axis");
    if (!select) return;
    select.addEventListener("change", function () {
      chosen[plot.id] = Number(select.value);
      draw(plot);
    });
  });
  dark.addEventListener("change", () => drawn.forEach(draw));

  // On paper everything is drawn, in light colours, and unfolded.
  const folded = document.getElementsByTagName("details");
  let opened = [];
  window.addEventListener("beforeprint", function () {
    printing = true;
    opened = Array.from(folded).filter((fold) => !fold.open);
    opened.forEach((fold) => (fold.open = true));
    plots.forEach(draw);
  });
  window.addEventListener("afterprint", function () {
    printing = false;
    opened.forEach((fold) => (fold.open = false));
    drawn.forEach(draw);
  });
})();
