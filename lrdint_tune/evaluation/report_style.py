"""How the report looks, by light and by dark."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2430; --soft: #5b6675; --rule: #dde2e9;
  --before: #c05f00; --after: #0b63b5; --third: #4c8a3f; --above: #08306b; --below: #a50f15; }
@media (prefers-color-scheme: dark) { :root { --page: #14181e; --ink: #e6eaf0; --soft: #9aa5b3; --rule: #2c343f;
  --before: #ffa24d; --after: #6cb4ff; --third: #8fd17f; --above: #6baed6; --below: #fc9272; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1480px; margin: 0 auto; padding: 20px 24px 60px; }
h1 { font-size: 24px; margin: 0 0 8px; } h2 { font-size: 18px; margin: 28px 0 8px; }
p { max-width: 980px; margin: 6px 0; } .note { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 18px; } figure { margin: 0; }
.chart { width: 460px; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 2px; }
svg { width: 100%; height: auto; display: block; }
.grid { stroke: var(--rule); stroke-width: 1; } .tick, .axis { fill: var(--soft); font-size: 11px; }
.before { color: var(--before); } .after { color: var(--after); } .third { color: var(--third); }
.above { color: var(--above); } .below { color: var(--below); }
polyline { fill: none; stroke: currentColor; stroke-width: 2; } circle { fill: currentColor; }
.dot { opacity: .35; } .legend { margin: 0 0 0 58px; font-size: 13px; } .legend span { margin-right: 16px; }
.maps > div { display: flex; gap: 8px; } .maps small { display: block; color: var(--soft); }
.maps img { width: 160px; height: 160px; image-rendering: pixelated; border: 1px solid var(--rule); }
details { margin-top: 24px; } summary { cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin-top: 8px; }
th, td { padding: 2px 8px; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
pre { overflow-x: auto; font-size: 13px; }
"""
