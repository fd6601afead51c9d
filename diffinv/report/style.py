"""Style sheet and script of the report page; they fetch nothing."""

from __future__ import annotations

CSS = """
:root { --ink: #1b1f24; --soft: #667079; --page: #f6f7f9; --card: #ffffff; --line: #dfe3e8; --warn: #b42318; --warn-bg: #fef1ef;
  --good: #146c43; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa4ae; --page: #12151a; --card: #1a1f26; --line: #2c333c;
  --warn: #ff9a8f; --warn-bg: #3a1714; --good: #6fd3a4; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3.5rem) 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.6rem; letter-spacing: -.01em; }
h2 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; }
.sub { color: var(--soft); margin: 0 0 1.2rem; }
.warn { background: var(--warn-bg); color: var(--warn); border-left: 5px solid var(--warn); border-radius: 6px;
  padding: .8rem 1.1rem; margin: 0 0 1.4rem; font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.3rem 1.3rem; margin: 0 0 1.4rem; }
.badges { display: flex; flex-wrap: wrap; gap: .4rem .5rem; margin: .5rem 0 .9rem; }
.badge { border: 1px solid var(--line); border-radius: 99px; padding: .05rem .7rem; font-size: .82rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.badge b { color: var(--ink); font-weight: 600; }
.badge.bad, .badge.bad b { color: var(--warn); border-color: var(--warn); }
.badge.good, .badge.good b { color: var(--good); border-color: var(--good); }
.band { margin: .9rem 0 .3rem; font-size: .85rem; font-weight: 600; color: var(--soft); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .8rem; max-width: 1500px; }
figure { margin: 0; max-width: 260px; }
figcaption { font-size: .82rem; margin-bottom: .25rem; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
figcaption span { color: var(--soft); }
.frame { width: 100%; aspect-ratio: 1; background: #808080; position: relative; border-radius: 4px; overflow: hidden; }
.frame img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.blink img { visibility: hidden; } .blink img.on { visibility: visible; }
.bar { display: block; width: 100%; height: 7px; margin-top: .35rem; border-radius: 3px; image-rendering: auto; }
.ticks { display: flex; justify-content: space-between; font-size: .72rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: 1rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.notes { color: var(--soft); font-size: .82rem; margin: .8rem 0 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
button { font: inherit; font-size: .85rem; padding: .25rem .9rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: var(--ink); cursor: pointer; margin-bottom: 1.2rem; }
"""

SCRIPT = """
const blinks = [...document.querySelectorAll('.blink')];
let paused = matchMedia('(prefers-reduced-motion: reduce)').matches, tick = 0;
const button = document.getElementById('pause');
const show = () => blinks.forEach(b => {
  const images = b.querySelectorAll('img');
  images.forEach((image, k) => image.classList.toggle('on', k === tick % images.length));
  b.parentElement.querySelector('.count').textContent = (tick % images.length + 1) + '/' + images.length;
});
const label = () => { button.textContent = paused ? 'Blink the samples' : 'Hold the samples'; };
button.addEventListener('click', () => { paused = !paused; label(); });
setInterval(() => { if (!paused) { tick += 1; show(); } }, 450);
label(); show();
"""
