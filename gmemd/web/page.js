"use strict";
// Applies the messages of /live to the page: each has the sections and rows that have changed.
(() => {
  const status = document.getElementById("live");
  const news = document.getElementById("news");
  const body = document.getElementById("rows");
  const element = html => {
    const template = document.createElement("template");
    template.innerHTML = html;
    return template.content.firstElementChild;
  };
  const key = node => {
    const row = node.closest("tr[data-id]");
    const details = node.closest("details[data-key]");
    return row && details ? [row.dataset.id, details.dataset.key] : null;
  };
  const find = ([id, name]) => document.getElementById("o-" + id)?.querySelector(`details[data-key="${name}"]`);

  function replaceRow(id, html, old) {
    const fresh = element(html);
    for (const open of old ? old.querySelectorAll("details[open]") : []) {
      const same = fresh.querySelector(`details[data-key="${open.dataset.key}"]`);
      if (same) same.open = true;
    }
    if (old) old.replaceWith(fresh); else fresh.classList.add("new");
    return fresh;
  }

  function update(message) {
    const focus = document.activeElement;
    const place = focus && focus.matches("summary") ? key(focus) : null;
    const id = focus && focus.id;
    for (const [name, html] of Object.entries(message.sections)) {
      const section = document.getElementById(name);
      if (section && section.innerHTML !== html) section.innerHTML = html;
    }
    for (const [name, html] of Object.entries(message.rows)) {
      const row = replaceRow(name, html, document.getElementById("o-" + name));
      if (!row.isConnected) body.append(row);
    }
    if (message.order) {
      const wanted = new Set(message.order);
      const before = body.children.length;
      for (const row of [...body.children]) if (!wanted.has(row.dataset.id)) row.remove();
      message.order.forEach((name, index) => {
        const row = document.getElementById("o-" + name);
        if (row && body.children[index] !== row) body.insertBefore(row, body.children[index] || null);
      });
      if (before !== body.children.length) news.textContent = body.children.length + " objects shown";
    }
    if (place && !document.contains(focus)) find(place)?.querySelector("summary").focus();
    else if (id && !document.contains(focus)) document.getElementById(id)?.focus();
  }

  const source = new EventSource("live" + location.search);
  source.addEventListener("update", event => { update(JSON.parse(event.data)); });
  source.onopen = () => { status.className = "on"; status.textContent = "live"; };
  source.onerror = () => { status.className = "off"; status.textContent = "connection lost, reconnecting"; };
})();
