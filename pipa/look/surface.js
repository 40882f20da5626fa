// One surface for pictures, maps, boxes and points. Traits bring what to show, messages take away what people do.
// Whatever can be shown without Python (hover, drag, lasso, zoom, opacity) is shown at once; Python's answer follows.

const GAP = 8, TITLE = 17, HANDLE = 9;
const clamp = (v, a, b) => Math.min(Math.max(v, a), b);

// Bytes arrive as a DataView in a notebook, and as a Uint8Array in an exported page.
const raw = v => !v ? new Uint8Array(0) : new Uint8Array(v.buffer, v.byteOffset, v.byteLength);
const floats = v => { const b = raw(v); return new Float32Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength)); };

function picture(bytes, w, h) {
  const c = document.createElement('canvas');
  c.width = w; c.height = h;
  c.getContext('2d').putImageData(new ImageData(new Uint8ClampedArray(bytes), w, h), 0, 0);
  return c;
}

function swatch(color) {  // names and colours come from files: they become text and values, never HTML
  const i = document.createElement('i');
  i.style.setProperty('--c', color);
  return i;
}

function isDark(el) {
  const b = document.body, jp = b.dataset.jpThemeLight;
  if (jp) return jp === 'false';
  if (b.classList.contains('vscode-light')) return false;
  if (b.classList.contains('vscode-dark') || b.dataset.vscodeThemeKind === 'vscode-dark') return true;
  return matchMedia('(prefers-color-scheme: dark)').matches;
}

// --- messages: one lazy event at a time is under way, of those that wait only the last one counts ---
function postman(model, lost) {
  let n = 0, due = 0, since = 0, waiting = null, clock = 0;
  const gone = () => { clearTimeout(clock); lost('Python is gone: run the cell again.'); };
  const post = ev => {
    due = ++n; since = performance.now(); clearTimeout(clock);
    try { model.send({ ...ev, n }); } catch { gone(); return n; }
    if (ev.type !== 'theme' && due) clock = setTimeout(() => lost('Python has not answered for 5 s: it is busy, or gone. Then run the cell again.'), 5000);
    return n;
  };
  model.on('comm:close', gone);
  model.on('change:done', () => {
    if (model.get('done') < due) return;
    due = 0; clearTimeout(clock);
    if (waiting) { const w = waiting; waiting = null; post(w); }
  });
  return (ev, lazy = false) => {
    if (lazy && due && performance.now() - since < 2000) { waiting = ev; return 0; }
    waiting = null;
    return post(ev);
  };
}

function render({ model, el }) {
  const g = k => model.get(k);
  const send = postman(model, text => { said.textContent = text; root.classList.add('pipa-gone'); root.classList.remove('pipa-busy'); });
  const root = document.createElement('div');
  root.className = 'pipa-surface';
  root.setAttribute('role', 'group');
  root.innerHTML = `<div class="pipa-status"><span class="pipa-pages" hidden><button type="button" class="pipa-chip" data-step="-1" title="images before these">‹</button><span></span>
    <button type="button" class="pipa-chip" data-step="1" title="images after these">›</button></span><span class="pipa-here"></span><span class="pipa-said" role="status" aria-live="polite"></span>
    <button type="button" class="pipa-chip pipa-ask" title="mouse and keys" aria-expanded="false">?</button></div><div class="pipa-help" hidden></div><div class="pipa-legend"></div>
    <div class="pipa-views"><div class="pipa-pics"><canvas class="pipa-images" tabindex="0" role="img"></canvas><div class="pipa-scales"></div></div>
    <div class="pipa-plot"><canvas class="pipa-points" tabindex="0" role="img"></canvas><div class="pipa-empty"></div><div class="pipa-keys"></div></div></div>`;
  for (const e of root.querySelectorAll('canvas, button')) e.dataset.lmSuppressShortcuts = 'true';  // JupyterLab asks the element with the focus: letters shall not be commands to the notebook
  el.append(root);
  const [images, points, pics, plot, keys, legend, here, said, pages, ask, help, empty, scales] =
    ['images', 'points', 'pics', 'plot', 'keys', 'legend', 'here', 'said', 'pages', 'ask', 'help', 'empty', 'scales'].map(k => root.querySelector('.pipa-' + k));

  const S = { zooms: {}, fine: null, asked: -1, fresh: [], pen: -1, seen: '', rects: [], base: [], over: [], heat: [], xy: new Float32Array(0), from: null, born: 0, boxes: [], active: 0, area: null,
    lasso: null, hover: null, tip: -1, cursor: null, view: { s: 1, x: 0, y: 0 }, drag: null, frames: 0, heats: 0, dirty: new Set(),
    version: 0, back: null, backed: '', laid: 0, colors: {} };
  const stale = new Set();  // loaders of traits that came since the last frame: what comes together is read once
  const color = name => S.colors[name] ||= getComputedStyle(root).getPropertyValue(name).trim();

  function named() {  // the handles of the sliders around, which have no name of their own
    let page = root;
    for (let p; (p = page.parentElement?.closest('.widget-vbox'));) page = p;
    for (const h of page.querySelectorAll('.noUi-handle')) h.setAttribute('aria-label', h.closest('.widget-slider')?.querySelector('.widget-label')?.textContent || 'slider');
  }

  // --- layout ---
  function size(canvas, w, h) {
    const r = window.devicePixelRatio || 1;
    const W = Math.round(w * r), H = Math.round(h * r);
    if (canvas.width !== W || canvas.height !== H) { canvas.width = W; canvas.height = H; }
    const ctx = canvas.getContext('2d');
    ctx.setTransform(r, 0, 0, r, 0, 0);
    return ctx;
  }

  function layout() {
    const total = root.clientWidth, panels = g('panels'), both = panels.length && (S.xy.length || g('empty')), fixed = g('height');
    if (!total) return;
    named();
    S.laid = window.devicePixelRatio; S.dirty.add('images').add('points');
    const side = both && total > 800, share = g('share');
    const W = Math.floor(side ? total * share - GAP : total), cols = Math.max(1, Math.min(g('cols') || 2, panels.length || 1));
    const cw = Math.min((W - GAP * (cols - 1)) / cols, g('max_width'));
    S.rects = []; let y = 0;
    for (let i = 0; i < panels.length; i += cols) {
      const row = panels.slice(i, i + cols), hs = row.map(p => Math.min(cw * p.h / p.w, fixed || 1e9));
      row.forEach((p, j) => S.rects.push({ x: j * (cw + GAP), y: y + TITLE, w: hs[j] * p.w / p.h, h: hs[j] }));
      y += TITLE + (fixed || Math.max(...hs)) + GAP;
    }
    pics.style.display = panels.length ? '' : 'none';
    (S.xy.length || g('empty') || !panels.length ? plot : pics).append(keys);  // without a plot they are about the images
    S.W = cols * cw + GAP * (cols - 1); S.H = Math.max(y, g('rows') * (TITLE + fixed + GAP)) - GAP;
    images.dataset.rects = JSON.stringify(S.rects.map(r => [r.x, r.y, r.w, r.h].map(v => Math.round(v * 10) / 10)));
    plot.style.display = S.xy.length || g('empty') ? '' : 'none';
    points.style.display = S.xy.length ? '' : 'none'; empty.textContent = S.xy.length ? '' : g('empty');
    S.PW = Math.floor(side ? total - S.W - 2 * GAP - 4 : Math.min(total, 720));
    plot.style.width = S.PW + 2 + 'px';
    S.PH = Math.floor(side ? clamp(S.H, 260, 620) : Math.min(S.PW * .75, 460));
    for (const [c, w, h] of [[images, S.W, S.H], [points, S.PW, S.PH]]) { c.style.width = w + 'px'; c.style.height = h + 'px'; }
  }

  // --- what arrives ---
  function cut(bytes, sizes) {
    let at = 0; const b = raw(bytes);
    return sizes.map(([w, h]) => { const n = w * h * 4, p = at + n <= b.length && n ? picture(b.subarray(at, at + n), w, h) : null; at += n; return p; });
  }
  const sent = () => g('panels').map(p => [p.W || p.w, p.H || p.h]);
  const loaders = {
    base() {
      S.base = cut(g('base'), sent()); S.version++;
      const now = g('panels').map(p => [p.title, p.w, p.h]).join();
      if (S.seen !== now) { S.seen = now; S.zooms = {}; S.fine = null; S.asked = -1; S.fresh = []; S.cursor = S.hover = null; }
    },
    over() { S.over = cut(g('over'), sent()); S.version++; },
    fine() {  // one image at its full size, for it is zoomed
      const p = g('panels')[g('fine')], of = k => p && cut(g(k), [[p.w, p.h]])[0];
      S.fine = p ? { panel: g('fine'), base: of('fine_base'), over: of('fine_over') } : null;
      S.asked = p ? g('fine') : -1; S.version++;
    },
    heat() {
      const b = raw(g('heat')), [w, h] = g('heat_size'), lut = raw(g('lut')), [lo, hi] = g('heat_range').map(v => (v + 1) * 127.5);
      const n = w * h, table = new Uint32Array(256), bytes = new Uint8Array(table.buffer);
      for (let v = 0; v < 256; v++) {  // below the threshold a veil, above it the colours, all in one table
        const k = clamp(Math.round((v - lo) / Math.max(hi - lo, 1e-6) * 255), 0, 255) * 4;
        bytes.set(v < lo ? [52, 58, 68, 150] : [lut[k], lut[k + 1], lut[k + 2], 255], v * 4);
      }
      S.heat.length = n ? Math.floor(b.length / n) : 0;
      for (let i = 0; i < S.heat.length; i++) {  // canvases are kept from map to map
        if (S.heat[i]?.width !== w || S.heat[i].height !== h) S.heat[i] = picture(new Uint8Array(4 * n), w, h);
        const c = S.heat[i], image = c.image ||= new ImageData(w, h), px = new Uint32Array(image.data.buffer);
        for (let j = 0; j < n; j++) px[j] = table[b[i * n + j]];
        c.getContext('2d').putImageData(image, 0, 0);
      }
      root.dataset.heats = ++S.heats;
    },
    xy() {
      const next = floats(g('xy')), calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
      S.from = !calm && S.xy.length === next.length && next.length ? now() : null;
      if (S.xy.length !== next.length) S.view = { s: 1, x: 0, y: 0 };
      S.xy = next; S.born = performance.now(); S.tip = -1;
    },
    boxes() { if (!S.drag || S.drag.kind !== 'box') S.boxes = g('boxes').map(b => ({ ...b })); },
    said() { said.textContent = g('said'); root.classList.toggle('pipa-busy', g('busy')); root.classList.remove('pipa-gone'); },
    legend() {  // chips stay where they are, or the one that was pressed would lose the focus
      const ls = g('legend'), pens = g('pens');
      while (legend.children.length > ls.length) legend.lastChild.remove();
      ls.forEach((l, i) => {
        const b = legend.children[i] || legend.appendChild(document.createElement('button'));
        b.type = 'button'; b.className = 'pipa-chip'; b.dataset.name = l.text; b.dataset.lmSuppressShortcuts = 'true';
        b.setAttribute('aria-pressed', pens ? i === S.pen : l.on !== false); b.classList.toggle('pipa-off', l.on === false); b.classList.toggle('pipa-pen', pens && i === S.pen);
        b.title = pens ? `label ${l.text}; shift-click: ${l.on === false ? 'show' : 'hide'} its points` : `${l.on === false ? 'show' : 'hide'} ${l.text}`;
        const part = (k, text) => { const e = document.createElement(k); e.textContent = text; return e; };
        b.replaceChildren(...(l.color ? [swatch(l.color)] : []), ...(l.key ? [part('kbd', l.key)] : []), l.text, ...(l.note ? [part('small', l.note)] : []));
        b.onclick = e => pens && !e.shiftKey ? choose(i === S.pen ? -1 : i) : send({ type: 'legend', i, text: l.text });
      });
    },
    pen() { S.pen = g('pen'); loaders.legend(); },
    scales() {
      scales.replaceChildren(...g('scales').map(k => {
        const e = document.createElement('span'), bar = document.createElement('i');
        bar.style.setProperty('--c', `linear-gradient(90deg, ${k.colors.join(', ')})`);
        e.append(k.text, ' ', k.lo, bar, k.hi);
        return e;
      }));
    },
    pages() {
      const [at, n, text] = g('pages');
      pages.hidden = n < 2; pages.children[1].textContent = text;
      for (const b of pages.querySelectorAll('button')) { const to = at + +b.dataset.step; b.disabled = to < 0 || to >= n; b.onclick = () => send({ type: 'page', to }); }
    },
    help() {
      ask.hidden = !g('help').length;
      help.replaceChildren(...g('help').map(([k, what]) => { const d = document.createElement('div'), b = document.createElement('b'); b.textContent = k; d.append(b, ' ' + what); return d; }));
    },
    go() {  // Python moves the cross
      const c = g('go');
      if (c.panel >= 0 && g('panels')[c.panel]) { S.cursor = S.hover = { panel: c.panel, x: c.x, y: c.y }; into(S.cursor); draw('images'); }
    },
    swatches() {
      keys.replaceChildren(...g('swatches').map(k => {
        const e = document.createElement('span');
        e.append(swatch(k.color), k.text);
        return e;
      }));
    },
    label() { root.setAttribute('aria-label', g('label')); images.setAttribute('aria-label', g('label') + ': images'); points.setAttribute('aria-label', g('label') + ': plot'); },
  };

  // --- points: data to screen and back ---
  function now() {  // positions at this moment of a move
    if (!S.from) return S.xy;
    const t = clamp((performance.now() - S.born) / 500, 0, 1), k = t * t * (3 - 2 * t);
    if (t >= 1) { S.from = null; return S.xy; }
    draw('points');
    return S.xy.map((v, i) => S.from[i] + (v - S.from[i]) * k);
  }
  const fit = () => Math.min(S.PW, S.PH) / 2 * .9 * S.view.s;
  const aspect = () => S.PW > S.PH ? [S.PW / S.PH, 1] : [1, S.PH / S.PW];
  const toScreen = (x, y) => { const [a, b] = aspect(), k = fit(); return [S.PW / 2 + (x - S.view.x) * k * a, S.PH / 2 - (y - S.view.y) * k * b]; };
  const toData = (X, Y) => { const [a, b] = aspect(), k = fit(); return [(X - S.PW / 2) / k / a + S.view.x, (S.PH / 2 - Y) / k / b + S.view.y]; };
  function nearest(X, Y, within = 9) {
    const xy = now(), st = raw(g('state')); let best = -1, d2 = within * within;
    for (let i = 0; i < xy.length / 2; i++) {
      if (st.length && !st[i]) continue;
      const [x, y] = toScreen(xy[2 * i], xy[2 * i + 1]), d = (x - X) ** 2 + (y - Y) ** 2;
      if (d < d2) { d2 = d; best = i; }
    }
    return best;
  }

  // --- images: a place in an image to screen and back; each may be zoomed in its frame ---
  const zoomed = i => S.zooms[i] || { s: 1, x: 0, y: 0 };
  const px = (i, x, y) => { const r = S.rects[i], p = g('panels')[i], z = zoomed(i); return [r.x + (x - z.x) * z.s / p.w * r.w, r.y + (y - z.y) * z.s / p.h * r.h]; };
  const framed = (i, X, Y) => { const r = S.rects[i]; return r && X >= r.x - 1 && X <= r.x + r.w + 1 && Y >= r.y - 1 && Y <= r.y + r.h + 1; };
  function held(i, z) {  // no edge of the image comes into its frame
    const p = g('panels')[i], s = clamp(z.s, 1, 32);
    if (s < 1.02) delete S.zooms[i]; else S.zooms[i] = { s, x: clamp(z.x, 0, p.w - p.w / s), y: clamp(z.y, 0, p.h - p.h / s) };
    if (s > 1.02 && p.W && p.W < p.w && S.asked !== i) { S.asked = i; send({ type: 'fine', panel: i }); }
    images.dataset.zooms = JSON.stringify(S.zooms); draw('images');
  }
  function magnify(h, f) {  // the place below the mouse stays there
    const z = zoomed(h.panel), s = clamp(z.s * f, 1, 32);
    held(h.panel, { s, x: h.x - (h.x - z.x) * z.s / s, y: h.y - (h.y - z.y) * z.s / s });
  }
  function into(h) {  // the cross stays in the frame
    const z = zoomed(h.panel), p = g('panels')[h.panel], w = p.w / z.s, t = p.h / z.s;
    if (h.x < z.x || h.x > z.x + w || h.y < z.y || h.y > z.y + t) held(h.panel, { s: z.s, x: h.x - w / 2, y: h.y - t / 2 });
  }
  function lay(ctx, pic, i) {  // a picture of the whole image, of any size, into its frame
    if (!pic) return;
    const r = S.rects[i], p = g('panels')[i], z = zoomed(i), k = pic.width / p.w, l = pic.height / p.h;
    ctx.drawImage(pic, z.x * k, z.y * l, pic.width / z.s, pic.height / z.s, r.x, r.y, r.w, r.h);
  }

  // --- drawing ---
  function outlined(ctx, f, inner, width = 2) {
    for (const [c, w] of [['rgba(0,0,0,.75)', width + 2], [inner, width]]) { ctx.strokeStyle = c; ctx.lineWidth = w; ctx.beginPath(); f(); ctx.stroke(); }
  }
  const dot = (ctx, x, y, m) => {  // a click with a class; a dashed ring where the net says otherwise
    ctx.beginPath(); ctx.arc(x, y, 5, 0, 7); ctx.fillStyle = m.color; ctx.fill(); outlined(ctx, () => ctx.arc(x, y, 5.5, 0, 7), '#fff', 1.5);
    if (m.off) { ctx.setLineDash([3, 3]); outlined(ctx, () => ctx.arc(x, y, 10, 0, 7), '#fff', 1.5); ctx.setLineDash([]); }
  };
  const mark = (ctx, x, y, r, sign) => {
    ctx.beginPath(); ctx.arc(x, y, r, 0, 7); ctx.fillStyle = sign < 0 ? '#d55e00' : '#fff'; ctx.fill(); ctx.lineWidth = 1.5; ctx.strokeStyle = '#000'; ctx.stroke();
    ctx.beginPath(); ctx.moveTo(x - r / 2, y); ctx.lineTo(x + r / 2, y); if (sign > 0) { ctx.moveTo(x, y - r / 2); ctx.lineTo(x, y + r / 2); } ctx.stroke();
  };

  function backdrop(panels) {  // images and what lies on them, at the size of the screen; scaled once, for it is the dearest part of a frame
    const alpha = g('over_alpha'), now = [S.version, S.W, S.H, window.devicePixelRatio, alpha, JSON.stringify([S.rects, S.zooms])].join();
    if (S.backed === now) return S.back;
    S.backed = now; S.back = S.back || document.createElement('canvas');
    const ctx = size(S.back, S.W, S.H);
    ctx.clearRect(0, 0, S.W, S.H);
    S.rects.forEach((r, i) => {
      const fine = S.fine && S.fine.panel === i ? S.fine : null;
      ctx.imageSmoothingEnabled = !panels[i].crisp && zoomed(i).s < 6; ctx.imageSmoothingQuality = 'high';
      lay(ctx, fine && fine.base || S.base[i], i);
      ctx.imageSmoothingEnabled = false; ctx.globalAlpha = alpha;
      if (alpha > 0) lay(ctx, fine && fine.over || S.over[i], i);
      ctx.globalAlpha = 1;
    });
    return S.back;
  }

  function drawImages() {
    const ctx = size(images, S.W, S.H), panels = g('panels');
    ctx.clearRect(0, 0, S.W, S.H);
    panels.forEach((p, i) => {
      const r = S.rects[i];
      ctx.font = '12px ' + color('--pipa-font'); ctx.textBaseline = 'alphabetic';
      let tx = r.x + 3;
      if (p.dot) { ctx.fillStyle = p.dot; ctx.beginPath(); ctx.arc(r.x + 7, r.y - 8, 4, 0, 7); ctx.fill(); tx += 12; }
      ctx.fillStyle = color('--pipa-fg'); ctx.fillText((p.title || '') + (zoomed(i).s > 1 ? `  ×${zoomed(i).s.toFixed(1)}` : ''), tx, r.y - 4, r.w - 12);
    });
    ctx.drawImage(backdrop(panels), 0, 0, S.W, S.H);
    ctx.imageSmoothingEnabled = true; ctx.imageSmoothingQuality = 'low'; ctx.globalAlpha = g('heat_alpha');
    if (g('heat_alpha') > 0) S.rects.forEach((r, i) => lay(ctx, S.heat[i], i));
    ctx.globalAlpha = 1;
    const at = floats(g('at')), st = raw(g('state')), rgb = raw(g('rgb'));
    for (let i = 0; i < st.length; i++) if (st[i] === 2 && at.length > 3 * i + 2 && S.rects[at[3 * i]]) {  // pixels lit by a selection
      const [x, y] = px(at[3 * i], at[3 * i + 1], at[3 * i + 2]);
      if (!framed(at[3 * i], x, y)) continue;
      ctx.beginPath(); ctx.arc(x, y, 3.4, 0, 7); ctx.fillStyle = `rgb(${rgb[3 * i]},${rgb[3 * i + 1]},${rgb[3 * i + 2]})`; ctx.fill();
      ctx.lineWidth = 1.2; ctx.strokeStyle = '#fff'; ctx.stroke();
    }
    for (const m of [...g('marks'), ...S.fresh]) if (S.rects[m.panel]) {
      const [x, y] = px(m.panel, m.x, m.y);
      if (framed(m.panel, x, y)) m.color ? dot(ctx, x, y, m) : mark(ctx, x, y, 6, m.sign ?? 1);
    }
    const meet = overlapOf();
    if (meet) { const [x, y] = px(meet.panel, meet.x, meet.y), [X, Y] = px(meet.panel, meet.x + meet.w, meet.y + meet.h); ctx.fillStyle = '#ffffff38'; ctx.fillRect(x, y, X - x, Y - y); }
    S.boxes.forEach((b, i) => {
      const r = S.rects[b.panel];
      if (!r) return;
      ctx.save(); ctx.beginPath(); ctx.rect(r.x - 3, r.y - 3, r.w + 6, r.h + 6); ctx.clip();
      const [x, y] = px(b.panel, b.x, b.y), [X, Y] = px(b.panel, b.x + b.w, b.y + b.h);
      outlined(ctx, () => ctx.rect(x, y, X - x, Y - y), b.color || '#fff', i === S.active ? 3 : 2);
      ctx.font = 'bold 12px ' + color('--pipa-font'); ctx.fillStyle = '#000c'; ctx.fillRect(x, y, 8 + ctx.measureText(b.text || '').width, b.text ? 16 : 0);
      ctx.fillStyle = b.color || '#fff'; ctx.fillText(b.text || '', x + 4, y + 12);
      ctx.fillStyle = b.color || '#fff'; ctx.fillRect(X - HANDLE / 2 - 1, Y - HANDLE / 2 - 1, HANDLE, HANDLE);
      ctx.restore();
    });
    if (S.area) { const a = S.area, [x, y] = px(a.panel, a.x, a.y), [X, Y] = px(a.panel, a.x + a.w, a.y + a.h); ctx.setLineDash([5, 3]); outlined(ctx, () => ctx.rect(x, y, X - x, Y - y), '#fff', 1.5); ctx.setLineDash([]); }
    let h = S.hover;
    if (S.tip >= 0 && at.length > 3 * S.tip + 2) h = { panel: at[3 * S.tip], x: at[3 * S.tip + 1], y: at[3 * S.tip + 2] };
    if (h && S.rects[h.panel]) {
      const [x, y] = px(h.panel, h.x, h.y);
      outlined(ctx, () => { for (const [a, b, c, d] of [[-9, 0, -3, 0], [3, 0, 9, 0], [0, -9, 0, -3], [0, 3, 0, 9]]) { ctx.moveTo(x + a, y + b); ctx.lineTo(x + c, y + d); } }, S.pen >= 0 && g('legend')[S.pen]?.color || '#fff', S.pen >= 0 ? 2.5 : 1.5);
    }
  }

  function drawPoints() {
    const ctx = size(points, S.PW, S.PH), xy = now(), st = raw(g('state')), rgb = raw(g('rgb')), shape = raw(g('shape'));
    ctx.clearRect(0, 0, S.PW, S.PH);
    ctx.fillStyle = color('--pipa-field'); ctx.fillRect(0, 0, S.PW, S.PH);
    const n = xy.length / 2, lit = st.includes(2), r = clamp(5.2 - n / 900, 2.4, 4.4), edge = color('--pipa-edge');
    for (const pass of lit ? [1, 2] : [1]) for (let i = 0; i < n; i++) {
      const s = st.length ? st[i] : 1;
      if (s !== pass) continue;
      const [x, y] = toScreen(xy[2 * i], xy[2 * i + 1]);
      ctx.globalAlpha = lit && s === 1 ? .16 : .9;
      ctx.fillStyle = `rgb(${rgb[3 * i]},${rgb[3 * i + 1]},${rgb[3 * i + 2]})`;
      ctx.beginPath();
      if (shape[i] === 1) { const R = r * 1.35; ctx.moveTo(x, y - R); ctx.lineTo(x + R * .95, y + R * .75); ctx.lineTo(x - R * .95, y + R * .75); ctx.closePath(); }
      else ctx.arc(x, y, r, 0, 7);
      ctx.fill();
      ctx.globalAlpha *= .6; ctx.lineWidth = .7; ctx.strokeStyle = edge; ctx.stroke();
    }
    ctx.globalAlpha = 1;
    for (const t of g('trails')) {
      ctx.beginPath(); t.xy.forEach(([x, y], i) => ctx[i ? 'lineTo' : 'moveTo'](...toScreen(x, y)));
      ctx.lineWidth = 2; ctx.strokeStyle = t.color; ctx.lineJoin = 'round'; ctx.stroke();
    }
    ctx.font = '600 11px ' + color('--pipa-font'); ctx.textAlign = 'center'; ctx.textBaseline = 'middle';
    const placed = [];
    for (const t of g('texts')) {  // names that would lie on each other move down
      let [x, y] = toScreen(t.x, t.y);
      const w = ctx.measureText(t.text).width / 2 + 3, hit = () => placed.some(o => Math.abs(o.x - x) < o.w + w && Math.abs(o.y - y) < 13);
      for (let k = 0; k < 12 && hit(); k++) y += 7;
      if (hit()) continue;  // forty names have no room; the chips name all
      placed.push({ x, y, w });
      ctx.lineWidth = 3; ctx.lineJoin = 'round'; ctx.strokeStyle = color('--pipa-field'); ctx.strokeText(t.text, x, y);
      ctx.fillStyle = color('--pipa-fg'); ctx.fillText(t.text, x, y);
    }
    ctx.textAlign = 'left'; ctx.textBaseline = 'alphabetic';
    if (S.lasso) { ctx.beginPath(); S.lasso.forEach(([x, y], i) => ctx[i ? 'lineTo' : 'moveTo'](x, y)); ctx.closePath(); ctx.fillStyle = color('--pipa-veil'); ctx.fill(); ctx.setLineDash([5, 4]); ctx.lineWidth = 1.5; ctx.strokeStyle = color('--pipa-fg'); ctx.stroke(); ctx.setLineDash([]); }
    drawTip(ctx, xy);
    ctx.font = '11px ' + color('--pipa-font');
    lines(ctx, g('caption'), S.PW - 16).reverse().forEach((l, i) => {
      ctx.fillStyle = color('--pipa-field'); ctx.globalAlpha = .85; ctx.fillRect(4, S.PH - 19 - 14 * i, ctx.measureText(l).width + 8, 15); ctx.globalAlpha = 1;
      ctx.fillStyle = color('--pipa-soft'); ctx.fillText(l, 8, S.PH - 8 - 14 * i);
    });
  }

  function lines(ctx, text, w) {  // broken at its dots, where it is too long
    return text.split(' · ').reduce((ls, t) => {
      const l = ls.length ? ls[ls.length - 1] + ' · ' + t : t;
      return ls.length && ctx.measureText(l).width <= w ? [...ls.slice(0, -1), l] : [...ls, t];
    }, []);
  }

  function drawTip(ctx, xy) {  // the pixel under the mouse: a ring, its surroundings, and what is known of it
    const i = S.tip;
    if (i < 0 || 2 * i >= xy.length) return;
    const [x, y] = toScreen(xy[2 * i], xy[2 * i + 1]), at = floats(g('at')), text = (g('tips')[i] || '').split('\n');
    outlined(ctx, () => ctx.arc(x, y, 7, 0, 7), '#fff');
    ctx.font = '11px ' + color('--pipa-font');
    const T = 84, pic = S.base[at[3 * i]], w = Math.max(pic ? T : 0, ...text.map(t => ctx.measureText(t).width)) + 12, h = (pic ? T + 4 : 0) + 14 * text.length + 10;
    const X = clamp(x + 14, 2, S.PW - w - 2), Y = clamp(y - h / 2, 2, S.PH - h - 2);
    ctx.fillStyle = color('--pipa-card'); ctx.strokeStyle = color('--pipa-line'); ctx.lineWidth = 1;
    ctx.beginPath(); ctx.roundRect(X, Y, w, h, 6); ctx.fill(); ctx.stroke();
    if (pic) {
      const k = 14, cx = at[3 * i + 1], cy = at[3 * i + 2];
      ctx.save(); ctx.beginPath(); ctx.rect(X + 6, Y + 6, T, T); ctx.clip(); ctx.fillStyle = '#000'; ctx.fillRect(X + 6, Y + 6, T, T); ctx.imageSmoothingEnabled = false;
      const f = pic.width / g('panels')[at[3 * i]].w;  // smaller than the image, if that is large
      ctx.drawImage(pic, (cx - k) * f, (cy - k) * f, 2 * k * f, 2 * k * f, X + 6, Y + 6, T, T); ctx.restore();
      outlined(ctx, () => ctx.rect(X + 6 + T / 2 - 5, Y + 6 + T / 2 - 5, 10, 10), '#fff', 1);
    }
    ctx.fillStyle = color('--pipa-fg');
    text.forEach((t, j) => ctx.fillText(t, X + 6, Y + (pic ? T + 10 : 4) + 12 + 14 * j - 2));
  }

  // --- frames: one for all that changed since the last, and only the canvas that it changed ---
  function draw(...what) {
    if (!S.dirty.size) requestAnimationFrame(frame);
    for (const k of what.length ? what : ['images', 'points']) S.dirty.add(k);
  }
  function relaid() { S.laid = 0; draw(); }

  function frame() {
    const went = stale.delete('go');  // the last: a new page forgets the cross
    for (const k of stale) loaders[k]();
    stale.clear();
    if (went) loaders.go();
    if (S.laid !== window.devicePixelRatio) layout();
    const todo = new Set(S.dirty);
    S.dirty.clear();
    if (!S.laid) return;
    if (todo.has('images') && g('panels').length) { drawImages(); images.dataset.marks = g('marks').length + S.fresh.length; }
    if (todo.has('points') && S.xy.length) drawPoints();
    root.dataset.frames = ++S.frames;
  }
  function point(i) {  // the pixel under the mouse, which both canvases show
    if (S.tip !== i) { S.tip = i; draw(); }
  }

  // --- mouse on images: click, shift-click, drag an area, drag or resize a box ---
  const where = (e, c) => { const b = c.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };
  function onPanel(X, Y, stay = null) {
    const i = stay ?? S.rects.findIndex(r => X >= r.x && X < r.x + r.w && Y >= r.y && Y < r.y + r.h);
    if (i < 0) return null;
    const r = S.rects[i], p = g('panels')[i], z = zoomed(i);
    return { panel: i, x: z.x + clamp((X - r.x) / r.w, 0, .9999) * p.w / z.s, y: z.y + clamp((Y - r.y) / r.h, 0, .9999) * p.h / z.s, k: p.w / r.w / z.s };
  }
  function boxAt(h) {
    for (const i of [S.active, ...S.boxes.keys()]) {
      const b = S.boxes[i];
      if (!b || b.panel !== h.panel) continue;
      if (Math.abs(h.x - b.x - b.w) < HANDLE * h.k && Math.abs(h.y - b.y - b.h) < HANDLE * h.k) return [i, true];
      if (h.x >= b.x && h.x <= b.x + b.w && h.y >= b.y && h.y <= b.y + b.h) return [i, false];
    }
    return null;
  }
  function overlapOf() {  // of two boxes on one image
    const [a, b] = S.boxes;
    if (S.boxes.length !== 2 || a.panel !== b.panel) return null;
    const x = Math.max(a.x, b.x), y = Math.max(a.y, b.y), w = Math.min(a.x + a.w, b.x + b.w) - x, h = Math.min(a.y + a.h, b.y + b.h) - y;
    return w > 0 && h > 0 ? { panel: a.panel, x, y, w, h, iou: w * h / (a.w * a.h + b.w * b.h - w * h) } : null;
  }
  const tell = h => { const m = overlapOf(); here.textContent = S.boxes.length === 2 ? `IoU ${m ? m.iou.toFixed(2) : '0'}` : h ? `${g('panels')[h.panel].title || ''}  x ${Math.floor(h.x)}, y ${Math.floor(h.y)}` : ''; };
  const flags = e => ({ add: e.ctrlKey || e.metaKey || e.altKey, neg: e.shiftKey });
  const boxes = final => send({ type: 'box', boxes: S.boxes, active: S.active, final }, !final);

  images.addEventListener('pointerdown', e => {
    const h = onPanel(...where(e, images));
    const move = h && (e.button || e.altKey) && S.zooms[h.panel];
    if (!h || e.button && !move) return;
    images.focus({ preventScroll: true });
    try { images.setPointerCapture(e.pointerId); } catch {}
    if (move) { S.drag = { kind: 'pan', at: h, X: e.clientX, Y: e.clientY, was: { ...move } }; return; }
    const b = boxAt(h);
    if (b) { S.active = b[0]; S.drag = { kind: 'box', at: h, i: b[0], resize: b[1], was: { ...S.boxes[b[0]] } }; draw('images'); }
    else S.drag = { kind: 'area', at: h, X: e.clientX, Y: e.clientY };
  });
  images.addEventListener('pointermove', e => {
    const [X, Y] = where(e, images), d = S.drag, h = onPanel(X, Y, d ? d.at.panel : null);
    S.hover = h; tell(h); point(-1);
    if (d && h && d.kind === 'pan') held(h.panel, { s: d.was.s, x: d.was.x - (e.clientX - d.X) * h.k, y: d.was.y - (e.clientY - d.Y) * h.k });
    else if (d && h && d.kind === 'box') {
      const p = g('panels')[h.panel], b = S.boxes[d.i], dx = h.x - d.at.x, dy = h.y - d.at.y;
      if (d.resize) { b.w = clamp(d.was.w + dx, 8, p.w - b.x); b.h = clamp(d.was.h + dy, 8, p.h - b.y); if (g('same_size')) S.boxes.forEach(o => { o.w = b.w; o.h = b.h; o.x = clamp(o.x, 0, p.w - o.w); o.y = clamp(o.y, 0, p.h - o.h); }); }
      else { b.x = clamp(d.was.x + dx, 0, p.w - b.w); b.y = clamp(d.was.y + dy, 0, p.h - b.h); }
      boxes(false);
    } else if (d && h && S.pen < 0 && Math.hypot(e.clientX - d.X, e.clientY - d.Y) > 4) {
      S.area = { panel: h.panel, x: Math.min(h.x, d.at.x), y: Math.min(h.y, d.at.y), w: Math.abs(h.x - d.at.x), h: Math.abs(h.y - d.at.y) };
    } else if (!d && g('hover') && S.pen < 0) send(h ? { type: 'hover', ...h } : { type: 'leave' }, true);
    const b = h && !d && boxAt(h);
    images.style.cursor = b ? (b[1] ? 'nwse-resize' : 'move') : h ? 'crosshair' : 'default';
    draw('images');
  });
  images.addEventListener('pointerup', e => {
    const d = S.drag, a = S.area;
    S.drag = S.area = null;
    if (!d || d.kind === 'pan') return;
    if (d.kind === 'box') boxes(true);
    else if (a) { send({ type: 'area', ...a, ...flags(e) }); draw('images'); }
    else { S.cursor = d.at; press(d.at, flags(e)); }
  });
  function press(h, how) {  // with a class in hand the mark is there before Python knows of it
    const n = send({ type: 'click', ...h, ...how, pen: S.pen });
    if (S.pen < 0 || !g('pens')) return;
    if (n > g('done')) S.fresh.push({ panel: h.panel, x: h.x, y: h.y, color: g('legend')[S.pen]?.color, n });
    draw('images');
  }
  function choose(i) {  // a class to label with, or -1: a click asks again
    S.pen = i; loaders.legend(); send({ type: 'pen', i }); draw('images');
  }
  images.addEventListener('wheel', e => {  // only when the images have the focus: a page shall scroll past them
    const h = onPanel(...where(e, images));
    if (!h || document.activeElement !== images && images.getRootNode().activeElement !== images && !e.ctrlKey) return;
    e.preventDefault(); magnify(h, Math.exp(-e.deltaY / 300));
  }, { passive: false });
  images.addEventListener('contextmenu', e => { if (Object.keys(S.zooms).length) e.preventDefault(); });
  images.addEventListener('pointercancel', () => { S.drag = S.area = null; draw('images'); });
  images.addEventListener('pointerleave', () => { if (S.drag) return; S.hover = null; tell(null); if (g('hover') && S.pen < 0) send({ type: 'leave' }, true); draw('images'); });

  images.addEventListener('keydown', e => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key], panels = g('panels');
    const b = S.boxes[S.active], pens = g('pens'), h = S.hover || S.cursor || { panel: 0, x: panels[0]?.w / 2, y: panels[0]?.h / 2 };
    if (pens && (/^\d$/.test(e.key) || '[]'.includes(e.key)) && !e.ctrlKey && !e.metaKey) {
      const n = g('legend').length, i = '[]'.indexOf(e.key) < 0 ? (+e.key + 9) % 10 : (S.pen + (e.key === ']' ? 1 : S.pen < 0 ? 0 : -1) + n) % n;
      if (i < n) choose(i);
    } else if (pens && e.key === ' ') send({ type: 'accept', ...h });
    else if (pens && e.key === 'n') send({ type: 'next' });
    else if (pens && e.key === 'd') send({ type: 'differs' });
    else if (pens && e.key === 'Delete') send({ type: 'drop', ...h });
    else if (pens && e.key === 'z' && (e.ctrlKey || e.metaKey)) send({ type: 'undo' });
    else if (e.key === '+' || e.key === '=') magnify(h, 1.5);
    else if (e.key === '-') magnify(h, 1 / 1.5);
    else if (e.key === '0') held(h.panel, { s: 1, x: 0, y: 0 });
    else if (b && arrow) {
      const p = panels[b.panel], k = g('step'), [dx, dy] = [arrow[0] * k, arrow[1] * k];
      if (e.shiftKey) for (const o of g('same_size') ? S.boxes : [b]) { o.w = clamp(o.w + dx, k, p.w - o.x); o.h = clamp(o.h + dy, k, p.h - o.y); }
      else { b.x = clamp(b.x + dx, 0, p.w - b.w); b.y = clamp(b.y + dy, 0, p.h - b.h); }
      boxes(true);
    } else if (b && (e.key === 'b' || e.key === ' ')) S.active = (S.active + 1) % S.boxes.length;
    else if (arrow || e.key === 'PageUp' || e.key === 'PageDown') {
      const c = S.cursor || { panel: 0, x: panels[0].w / 2, y: panels[0].h / 2 }, k = e.shiftKey ? 8 : 1;
      const to = c.panel + (arrow ? 0 : e.key === 'PageDown' ? 1 : -1), turn = g('pages')[0] + (to < 0 ? -1 : 1);
      if ((to < 0 || to >= panels.length) && turn >= 0 && turn < g('pages')[1]) { send({ type: 'page', to: turn }); e.preventDefault(); e.stopPropagation(); return; }
      const i = (to + panels.length) % panels.length, p = panels[i];
      S.cursor = S.hover = { panel: i, x: clamp(c.x + (arrow ? arrow[0] * k : 0), 0, p.w - .001), y: clamp(c.y + (arrow ? arrow[1] * k : 0), 0, p.h - .001) };
      into(S.cursor); tell(S.cursor); if (g('hover') && S.pen < 0) send({ type: 'hover', ...S.cursor }, true);
    } else if (e.key === 'Enter' && S.cursor) press(S.cursor, flags(e));
    else if (e.key === 'Backspace' || e.key === 'Delete') send({ type: 'undo' });
    else if (e.key === 'Escape' && S.pen >= 0) choose(-1);
    else if (e.key === 'Escape') send({ type: 'clear' });
    else return;
    e.preventDefault(); e.stopPropagation(); draw('images');
  });

  // --- mouse on points: lasso, click, wheel to zoom, alt or right button to move ---
  points.addEventListener('pointerdown', e => {
    points.focus({ preventScroll: true });
    try { points.setPointerCapture(e.pointerId); } catch {}
    const [X, Y] = where(e, points), move = e.altKey || e.button;
    S.drag = { kind: move ? 'pan' : 'lasso', X, Y, view: { ...S.view } };
    if (!move) S.lasso = [[X, Y]];
  });
  points.addEventListener('pointermove', e => {
    const [X, Y] = where(e, points), d = S.drag;
    if (d && d.kind === 'pan') { const [a, b] = toData(d.X, d.Y), [x, y] = toData(X, Y); S.view.x += a - x; S.view.y += b - y; d.X = X; d.Y = Y; }
    else if (d) { S.lasso.push([X, Y]); point(-1); }
    else return point(nearest(X, Y));
    draw('points');
  });
  points.addEventListener('pointerup', e => {
    const d = S.drag, l = S.lasso;
    S.drag = S.lasso = null;
    if (!d || d.kind === 'pan') return draw('points');
    const far = Math.max(...l.map(([x, y]) => Math.hypot(x - d.X, y - d.Y)));
    if (far > 5) send({ type: 'lasso', poly: l.map(p => toData(...p)), ...flags(e) });
    else { const i = nearest(d.X, d.Y); send(i < 0 ? { type: 'clear' } : { type: 'point', i, ...flags(e) }); }
    draw('points');
  });
  points.addEventListener('pointerleave', () => { if (!S.drag) point(-1); });
  points.addEventListener('contextmenu', e => e.preventDefault());
  points.addEventListener('dblclick', () => { S.view = { s: 1, x: 0, y: 0 }; draw('points'); });
  function zoom(f, X = S.PW / 2, Y = S.PH / 2) {
    const [x, y] = toData(X, Y); S.view.s = clamp(S.view.s * f, .5, 40);
    const [a, b] = toData(X, Y); S.view.x += x - a; S.view.y += y - b; draw('points');
  }
  points.addEventListener('wheel', e => {  // only when the plot has the focus: a page shall scroll past it
    if (document.activeElement !== points && points.getRootNode().activeElement !== points && !e.ctrlKey) return;
    e.preventDefault(); zoom(Math.exp(-e.deltaY / 400), ...where(e, points));
  }, { passive: false });
  points.addEventListener('keydown', e => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[e.key];
    if (arrow) { S.view.x += arrow[0] * .1 / S.view.s; S.view.y += arrow[1] * .1 / S.view.s; draw('points'); }
    else if (e.key === '+' || e.key === '=') zoom(1.25);
    else if (e.key === '-') zoom(.8);
    else if (e.key === '0') { S.view = { s: 1, x: 0, y: 0 }; draw('points'); }
    else if (e.key === 'Escape') send({ type: 'clear' });
    else return;
    e.preventDefault(); e.stopPropagation();
  });

  // --- life ---
  const on = (names, f) => names.forEach(k => model.on('change:' + k, f));
  legend.addEventListener('keydown', e => {  // after a press on a chip the keys of the pen go on
    if (!g('pens') || !/^[\dn[\]]$|^d$|^(Escape|Backspace|Delete)$/.test(e.key)) return;
    e.preventDefault(); e.stopPropagation(); images.focus({ preventScroll: true });
    images.dispatchEvent(new KeyboardEvent('keydown', { key: e.key, ctrlKey: e.ctrlKey }));
  });
  ask.onclick = () => { help.hidden = !help.hidden; ask.setAttribute('aria-expanded', !help.hidden); };
  on(['panels'], () => { stale.add('base').add('over'); relaid(); });
  on(['base'], () => { stale.add('base'); draw(); });
  on(['over'], () => { stale.add('over'); draw('images'); });
  on(['heat', 'heat_size', 'heat_range', 'lut'], () => { stale.add('heat'); draw('images'); });
  on(['xy'], () => { loaders.xy(); relaid(); });
  on(['boxes'], () => { loaders.boxes(); draw('images'); });
  on(['legend'], loaders.legend);
  on(['swatches'], loaders.swatches);
  on(['said', 'busy'], loaders.said);
  on(['pen', 'pens'], () => { loaders.pen(); draw('images'); });
  on(['scales'], loaders.scales);
  on(['pages'], loaders.pages);
  on(['help'], loaders.help);
  on(['go'], () => { stale.add('go'); draw('images'); });
  on(['fine', 'fine_base', 'fine_over'], () => { stale.add('fine'); draw('images'); });
  on(['done'], () => { const n = S.fresh.length; S.fresh = S.fresh.filter(m => m.n > g('done')); if (n !== S.fresh.length) draw('images'); if (root.classList.contains('pipa-gone')) loaders.said(); });
  on(['marks', 'over_alpha', 'heat_alpha'], () => draw('images'));
  on(['shape', 'tips', 'texts', 'trails', 'caption'], () => draw('points'));
  on(['at', 'state', 'rgb'], () => draw());
  on(['cols', 'share', 'max_width', 'empty', 'height', 'rows'], relaid);
  Object.values(loaders).forEach(f => f());
  let dark = null;
  const theme = () => { const d = isDark(root); root.classList.toggle('pipa-dark', d); if (d !== dark) { dark = d; send({ type: 'theme', dark: d }); } S.colors = {}; draw(); };
  const resized = new ResizeObserver(relaid), themed = new MutationObserver(theme);
  resized.observe(root);
  themed.observe(document.body, { attributes: true });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', theme);
  theme();
  return () => { resized.disconnect(); themed.disconnect(); matchMedia('(prefers-color-scheme: dark)').removeEventListener('change', theme); };
}

export default { render };
