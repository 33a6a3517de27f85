"use strict";
(() => {
  const root = document.documentElement;
  const wide = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : wide.matches);
  const drawn = new Map();
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Drawings -------------------------------------------------------------------------------------------------------
  const dressed = (layout) => {
    const ink = colour("--ink"), line = colour("--line"), sans = colour("--sans");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    const made = {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { color: ink, family: sans, size: 13 }, margin: { l: 56, r: 14, t: 12, b: 44, ...(layout.margin || {}) },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", ...(layout.legend || {}) }, hoverlabel: { namelength: -1 },
    };
    for (const key of ["xaxis", "yaxis", ...Object.keys(layout).filter((k) => /^[xy]axis\d/.test(k))]) {
      made[key] = { ...axis, ...(layout[key] || {}) };
    }
    if (layout.scene) {
      made.scene = { ...layout.scene };
      for (const key of ["xaxis", "yaxis", "zaxis"]) {
        made.scene[key] = { visible: false, showbackground: false, ...(layout.scene[key] || {}) };
      }
    }
    return made;
  };
  const options = { displaylogo: false, responsive: true, displayModeBar: false, scrollZoom: false };
  const numbers = (text, Kind) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Kind(bytes.buffer);
  };
  const cloudTraces = (cloud, which) => {
    const at = cloud.points, colouring = cloud.colourings[which], label = numbers(colouring.label, Int16Array);
    const places = new Map();
    label.forEach((value, i) => (places.get(value) || places.set(value, []).get(value)).push(i));
    return [...places.keys()].sort((a, b) => a - b).map((value) => ({
      type: "scatter3d", mode: "markers", name: value < 0 ? "none" : colouring.names[value],
      x: places.get(value).map((i) => at[3 * i]), y: places.get(value).map((i) => at[3 * i + 1]),
      z: places.get(value).map((i) => at[3 * i + 2]), hoverinfo: "name",
      marker: { size: 2.4, color: value < 0 ? "#9aa1ad" : colouring.colours[value % colouring.colours.length] },
    }));
  };
  const readCloud = (node) => {
    const cloud = JSON.parse(document.getElementById(node.dataset.cloud).textContent);
    const packed = numbers(cloud.position, Uint16Array);
    cloud.points = Float32Array.from(packed, (value, i) => cloud.low[i % 3] + value * cloud.step);
    return cloud;
  };
  const draw = (node) => {
    if (drawn.has(node) || !node.offsetParent) return;
    if (node.dataset.cloud) {
      const cloud = readCloud(node), scene = { aspectmode: "data", dragmode: "turntable", camera: { eye: { x: 1.35, y: -1.35, z: 1.1 } } };
      drawn.set(node, { cloud, layout: { scene, uirevision: "kept", margin: { l: 0, r: 0, t: 0, b: 56 }, legend: { y: 0, yanchor: "top", itemsizing: "constant" } } });
      Plotly.newPlot(node, cloudTraces(cloud, Number(node.dataset.which || 0)), dressed(drawn.get(node).layout), options);
    } else {
      const figure = JSON.parse(document.getElementById(node.dataset.plot).textContent);
      drawn.set(node, figure);
      Plotly.newPlot(node, figure.data, dressed(figure.layout), options);
    }
  };
  const plots = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver((found) => {
    for (const one of found) {
      if (one.isIntersecting) draw(one.target);
      // A browser keeps sixteen drawings in space at once and drops the oldest: those out of sight are given back.
      else if (one.target.dataset.cloud && drawn.delete(one.target)) Plotly.purge(one.target);
    }
  }, { rootMargin: "200px" });
  plots.forEach((node) => near.observe(node));
  const redress = () => drawn.forEach((figure, node) => Plotly.relayout(node, dressed(figure.layout)));

  document.querySelectorAll("[data-colouring]").forEach((button) => button.addEventListener("click", () => {
    const node = document.getElementById(button.dataset.of);
    node.dataset.which = button.dataset.colouring;
    draw(node);
    const held = drawn.get(node);
    button.parentElement.querySelectorAll("button").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    if (held) Plotly.react(node, cloudTraces(held.cloud, Number(button.dataset.colouring)), dressed(held.layout), options);
  }));
  document.querySelectorAll("[data-cloud]").forEach((node) => node.addEventListener("keydown", (event) => {
    const turn = { ArrowLeft: 0.15, ArrowRight: -0.15 }[event.key], lift = { ArrowUp: 0.15, ArrowDown: -0.15 }[event.key];
    if ((!turn && !lift) || !drawn.has(node)) return;
    event.preventDefault();
    const eye = node._fullLayout.scene.camera.eye, c = Math.cos(turn || 0), s = Math.sin(turn || 0);
    Plotly.relayout(node, { "scene.camera.eye": { x: eye.x * c - eye.y * s, y: eye.x * s + eye.y * c, z: eye.z + (lift || 0) } });
  }));

  // Tabs: arrow keys move, Home and End go to the ends ---------------------------------------------------------------
  const select = (tab, focus) => {
    for (const other of tab.parentElement.querySelectorAll('[role="tab"]')) {
      const chosen = other === tab, panel = document.getElementById(other.getAttribute("aria-controls"));
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      panel.hidden = !chosen;
    }
    if (focus) tab.focus();
    tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    drawn.forEach((_, node) => { if (node.offsetParent) Plotly.Plots.resize(node); });
  };
  document.querySelectorAll("[data-tabs]").forEach((list) => {
    const tabs = [...list.querySelectorAll('[role="tab"]')];
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => select(tab, false));
      tab.addEventListener("keydown", (event) => {
        const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (next === undefined) return;
        event.preventDefault();
        select(tabs[(next + tabs.length) % tabs.length], true);
      });
    });
    select(tabs[Number(list.dataset.first || 0)], false);
  });
  document.querySelectorAll("[data-opens]").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    select(document.getElementById(link.dataset.opens), true);
    window.scrollTo({ top: 0 });
  }));
  document.querySelectorAll("details").forEach((node) => node.addEventListener("toggle", () => {
    node.querySelectorAll(".plot").forEach(draw);
  }));

  // Light and dark ---------------------------------------------------------------------------------------------------
  const button = document.getElementById("theme");
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
    button.setAttribute("aria-pressed", String(isDark()));
    redress();
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  wide.addEventListener("change", show);
  show();
  // An address such as report.html#tab-system-1 or #tab-run-2 opens what it names.
  const open = () => {
    for (let node = document.getElementById(decodeURIComponent(location.hash.slice(1))); node; node = node.parentElement) {
      const name = node.getAttribute("role") === "tabpanel" ? node.getAttribute("aria-labelledby") : node.id;
      const tab = name && document.getElementById(name);
      if (tab && tab.getAttribute("role") === "tab") select(tab, false);
    }
  };
  window.addEventListener("hashchange", open);
  open();
  window.scrollTo({ top: 0 });
})();
