"""The page's style sheet: light and dark, narrow and wide. No font and no picture from elsewhere.
Text only; without the characters that XML would want escaped."""

STYLE = """
:root{color-scheme:light dark;--back:#fcfcfb;--card:#fff;--ink:#1a1a19;--soft:#5f5e58;
--line:#dddcd6;--gray:#8f8e86;--blue:#2a78d6;--orange:#d95f1e;--aqua:#158a61;--violet:#6a5acd;
--yellow:#b98a00;--good:#14804a;--bad:#c0272d;--on:#fff}
@media (prefers-color-scheme:dark){:root{--back:#161615;--card:#1f1f1d;--ink:#f0efe9;
--soft:#b0afa6;--line:#3a3a36;--gray:#77766f;--blue:#4a92e8;--orange:#e8793f;--aqua:#2bb583;
--violet:#9a8df0;--yellow:#d3a52a;--good:#3fbf7f;--bad:#ff6b6b;--on:#101010}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}
header p{margin:0;color:var(--soft)}
h1{font-size:1.4rem;line-height:1.3;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h1 span{color:var(--soft);font-weight:400}
h2{font-size:1rem;margin:0 0 .6rem}
#verdict{color:var(--ink);border-left:4px solid var(--gray);padding:.4rem .8rem;
background:var(--card);overflow-wrap:anywhere;white-space:pre-wrap}
#verdict.good{border-color:var(--good)}
#verdict.bad{border-color:var(--bad)}
section,details{background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:.9rem 1rem;margin:1rem 0}
section p{color:var(--soft);margin:.2rem 0 .6rem;font-size:.87rem}
dl{display:flex;flex-wrap:wrap;gap:.7rem;margin:0}
dl div{flex:0 0 8.5rem}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
@media (max-width:30rem){main{padding:.6rem}h1{font-size:1.15rem}section,details{padding:.7rem}
dl div{flex-basis:6.2rem}dt{font-size:.75rem}dd{font-size:1rem}}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.87rem;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--soft)}
th,td{padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top}
i{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin:0 .45em 0 0}
.legend i+i,.legend i:not(:first-child){margin-left:1em}
.bar{display:block;height:5px;min-width:4.5rem;background:var(--line);border-radius:3px}
.chart{display:block;overflow:visible}
.chart text{font-size:11px;fill:var(--soft);paint-order:stroke;stroke:var(--card);stroke-width:3px}
.chart text.in{fill:var(--on);font-weight:600;stroke:none}
.chart rect{stroke:var(--card);stroke-width:1px}
.grid{stroke:var(--line);stroke-width:1}
.tick{stroke:var(--gray);stroke-width:1}
.mark{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3}
polyline{fill:none;stroke-width:2;stroke-linejoin:round;vector-effect:non-scaling-stroke}
polyline.guest{stroke:var(--blue)}
polyline.wire{stroke-dasharray:7 4}
polyline.wire,polyline.dirty{stroke:var(--orange)}
polyline.rate{stroke:var(--gray)}
i.guest{background:var(--blue)}
i.wire,i.dirty{background:var(--orange)}
i.rate{background:var(--gray)}
circle.guest{fill:var(--blue)}
circle.wire,circle.dirty{fill:var(--orange)}
circle.rate{fill:var(--gray)}
rect.setup{fill:var(--gray)}
rect.active,rect.fault{fill:var(--blue)}
rect.device{fill:var(--orange)}
rect.postcopy{fill:var(--violet)}
rect.paused{fill:var(--yellow)}
i.setup{background:var(--gray)}
.bar .wait{fill:var(--gray)}
i.active{background:var(--blue)}
.bar .cpu,.bar .page{fill:var(--blue)}
i.device{background:var(--orange)}
i.postcopy{background:var(--violet)}
i.paused{background:var(--yellow)}
.bar .codec{fill:var(--aqua)}
i.completed{background:var(--good)}
i.failed{background:var(--bad)}
i.running{background:var(--blue)}
i.waiting{background:var(--yellow)}
i.pending,i.cancelled{background:var(--line)}
td small{display:block;color:var(--soft);min-width:7rem;overflow-wrap:anywhere}
td small.error{color:var(--bad)}
.items td+td{white-space:nowrap}
rect.completed{fill:var(--good)}
rect.failed{fill:var(--bad)}
rect.running{fill:var(--blue)}
rect.cancelled{fill:var(--gray)}
summary{cursor:pointer}
pre{overflow-x:auto;font-size:.8rem}
"""

# What only the live page has.
LIVE_STYLE = """
#link{position:sticky;top:0;z-index:1;margin:0;padding:.5rem 1rem;background:var(--yellow);
color:#161615;text-align:center}
body[data-over] #link{background:var(--line);color:var(--ink)}
#verdict{margin-bottom:.5rem}
#verdict.running{border-color:var(--blue)}
progress{display:block;width:100%;height:.6rem;appearance:none;border:0;border-radius:3px;
background:var(--line);overflow:hidden}
progress::-webkit-progress-bar{background:var(--line)}
progress::-webkit-progress-value{background:var(--blue)}
progress::-moz-progress-bar{background:var(--blue)}
"""
