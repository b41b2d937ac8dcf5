"""The page's words: captions by figure, how each number is defined, and the HTML around them."""

CAPTIONS = {
    "psnr_by_step": "Quantiles are over the {seeds} of one target at each step, failed seeds "
    "ranked worst. A band shows how much depends on the random start alone.",
    "psnr_distribution": "Each dot is one trial. The diamond is what an attacker would hand in; "
    "the ring is known only to somebody who has the truth.{triangle}",
    "reconstructions": "Pictures are enlarged without smoothing, from 8-bit pixels.{blurred}",
    "pixel_statistics": "A place with a failed seed is left empty rather than averaged over the "
    "others. One colour scale for all.",
    "best_of_k": "Exact expectation over all choices of k of the {seeds}. A curve starts where k "
    "exceeds the number of failed seeds; before that, all k might fail.{sampled}",
    "variance_components": "Balanced one-way random effects on PSNR in dB. Intervals that reach 0 "
    "cannot exclude that all targets are equally hard.",
    "paired_differences": "Each setting minus the first one. What makes a target hard in both "
    "cancels, so that these intervals are narrower than those of the means.",
    "defense_curves": "A strength at which an attack scores what the mean colour does says "
    "something of this attack, and nothing of a better one. A cross: every trial failed, as no "
    "update was left.",
    "posterior": "From draws of the Gaussian approximation of the posterior at the attack’s last "
    "step. It knows nothing of an image that the attack took for another one.",
    "spectrum": "Singular values below about 10<sup>−8</sup> of the largest are rounding: they are "
    "square roots of the eigenvalues of JᵀJ. Pictures: grey is no change.",
    "trade_off": "The bound counts what any attack could do with the one update, whatever it calls "
    "success; this attack succeeds far less often. Epsilon is that of the whole training.",
    "label_accuracy": "Labels read off an update are the same for all of its starts; those found "
    "beside the images are each start’s own. Guessing blindly counts about as many right as two "
    "random batches have in common.",
    "success_rate": "The threshold of {threshold} dB is a convention: Dimitrov et al. 2022 call a "
    "CIFAR-100 image recovered above 19 dB.",
}
# What captions add where the best quarter of the seeds is more than one of them.
AVERAGED = {
    "triangle": " A triangle, which an attacker can have too, is the mean image of the {quarter} "
    "seeds with the lowest objectives.",
    "blurred": " A mean image is blurred where its seeds disagree, which squared error, and so "
    "PSNR, favours.",
    "sampled": " The consensus of up to four seeds is the attacker’s pick, and grows by a seed "
    "with every four; where there are many choices of k, a random sample of them stands for all.",
}
NOT_TRIED = (
    "A defense leaves an attack nothing here when no trial is above the threshold and the upper "
    "limit of the mean PSNR lies less than 1 dB above the mean colour, at the strength named and "
    "at all above it. That is a statement about the attacks in this table and no others. Not "
    "tried: attacks with a learned image prior, attacks that average several updates of one "
    "client, attacks that choose the network’s parameters, and every combination of settings that "
    "was not swept."
)
ASSUMED = (
    "Chosen without the truth: the fewest images whose objective is at most {factor:g} times the "
    "least one, for more images than there are explain an update as well; of any other unknown the "
    "value with the least objective."
)
DEFINITIONS = [
    ("Target, seed, trial, cell", "A target is one shared update, of one or several images. A seed "
     "names one random start of the attack. A trial is one target attacked from one seed. A cell "
     "is one setting of the sweep and holds targets × seeds trials."),
    ("PSNR", "10 log<sub>10</sub>(1 / MSE) in dB, on pixels clamped to [0, 1] with data range 1; "
     "per image, then the mean over the target’s images. Reconstructions of several images are "
     "matched one to one to the truths first. An exact reconstruction has PSNR ∞ and is not "
     "capped: it makes means ∞ and spreads undefined; the tables count such trials as exact."),
    ("SSIM", "Structural similarity with a Gaussian window of σ = 1.5, K<sub>1</sub> = 0.01, "
     "K<sub>2</sub> = 0.03, data range 1, as in dm-pix; mean over channels and images."),
    ("Mean colour", "The same metrics for an image filled with the data set’s mean colour: what "
     "one scores without attacking at all."),
    ("Mean and its interval", "Mean over all trials of a cell; 95% Student t interval of the means "
     "per target. It covers further targets drawn like these, which more seeds cannot replace. "
     "One target has no interval."),
    ("Seed std", "Standard deviation between the seeds of one target, variances pooled over "
     "targets."),
    ("Draw of noise", "Where a defense is random, each target’s update is defended anew in every "
     "draw, and every draw is attacked from the same starts. Sizes are then targets × draws × "
     "seeds; the best of k is among the starts on one draw."),
    ("Cosine to the true update", "Between what the client sent and what it would have sent "
     "without the defense: the direction in which training goes on. 1: the defense costs nothing."),
    ("Bound on any attack", "The largest probability with which any attacker who sees the one "
     "noisy update, and knows the network and every other image of the batch, names the image "
     "right, if without the update it would be right once in 10,000 (Hayes et al. 2023, arXiv "
     "2302.07225, theorem 2, for one Gaussian release: Φ(Φ<sup>−1</sup>(1/10,000) + 1/noise "
     "multiplier)). The figures of the attack are of another event, a PSNR above the threshold: "
     "the bound is above them only as far as guessing reaches that no more often."),
    ("Between targets, draws and seeds", "Balanced nested random effects; a negative estimate is "
     "set to 0. Intervals: percentiles of a bootstrap in stages (targets, then draws, then seeds "
     "within each), 2000 resamples. With few targets those between targets are too short: in "
     "simulation the nominal 95% cover about 67% with 4 targets, 81% with 10, 91% with 30."),
    ("Paired difference", "A cell’s PSNR minus the first cell’s on the same targets and seeds; "
     "mean over targets with a 95% Student t interval. Intervals are not corrected for the number "
     "of comparisons."),
    ("Best of k", "The reconstruction chosen among k seeds of a target. The attacker chooses by "
     "the lowest objective, the distance between the updates, and never sees the truth. The "
     "oracle chooses by the highest PSNR; nobody can do that without the truth. “Best” in the "
     "tables is the best of all {seeds}."),
    ("Consensus", "The mean image of the best quarter of a target’s seeds by the objective, "
     "rounded up ({quarter} of {seeds}), or of all of them; on one draw of noise, if there are "
     "several. It needs no truth, and where starts err independently their mean errs less than "
     "any of them. The images of a batch are first set in the order of the pick’s by least squared "
     "error and averaged; the means are matched to the truths. Failed seeds are left out. From the "
     "stored 8-bit pictures; where the seeds’ errors are too small for these (above 50 dB), the "
     "mean of their recorded errors stands in, which the mean image’s does not exceed."),
    ("Above {threshold} dB", "Share of trials with PSNR above the threshold. 95% Wilson interval "
     "at Kish’s effective number of trials n / (1 + (seeds − 1) ICC), with the intraclass "
     "correlation of the successes; where that is undefined, at the number of targets."),
    ("Labels that are right", "What the labels found and the true ones have in common, repeats "
     "counted, over their number: the order of a batch is in no update."),
    ("Failed", "A trial that turned non-finite. It counts as a miss, ranks worst in medians, is "
     "never chosen while another seed is left, and makes a mean undefined (—): an average of "
     "the survivors would flatter the setting that fails."),
]  # fmt: skip

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title · jaxinv report</title>
<style>
:root { --ink: #1c2128; --muted: #5b6470; --line: #e1e5ea; --page: #f6f7f9; --card: #fff;
  --accent: #0072b2; --soft: #eef3f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #a2abb6; --line: #333b45;
  --page: #14181d; --card: #1c2229; --accent: #56b4e9; --soft: #242c35; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 Inter, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 40px 20px 72px; }
header p { margin: 0; color: var(--muted); font-size: 14px; }
h1 { font-size: clamp(24px, 4.2vw, 34px); line-height: 1.2; letter-spacing: -0.015em;
  margin: 4px 0 20px; text-wrap: balance; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 44px 0 12px; }
.findings { list-style: none; margin: 0; padding: 16px 20px; background: var(--soft);
  border-left: 4px solid var(--accent); border-radius: 4px 10px 10px 4px; }
.findings li + li { margin-top: 8px; }
figure { margin: 0 0 20px; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 10px;
  border: 1px solid var(--line); }
figcaption { color: var(--muted); font-size: 14px; margin: 8px 4px 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; font-size: 14px; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: 13px; vertical-align: bottom;
  white-space: normal; line-height: 1.3; min-width: 4.4em; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
tbody tr { border-top: 1px solid var(--line); }
tr.reference td { color: var(--muted); font-style: italic; }
small { color: var(--muted); font-size: 12px; }
dl { margin: 0; font-size: 15px; }
dt { font-weight: 600; margin-top: 14px; }
dd { margin: 2px 0 0; color: var(--muted); }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--ink);
  background: var(--soft); padding: 2px 6px; border-radius: 4px; overflow-wrap: anywhere; }
details summary { cursor: pointer; color: var(--accent); margin: 16px 0; }
.note { color: var(--muted); font-size: 14px; margin: 10px 4px 0; }
@media (max-width: 640px) { main { padding: 24px 14px 48px; } th, td { padding: 7px 9px; }
  td:first-child, th:first-child { max-width: 9em; white-space: normal; } }
</style>
</head>
<body>
<main>
<header><p>Gradient inversion · $title</p><h1>$question</h1></header>
<ul class="findings">$findings</ul>

<h2>Results</h2>
$summary
<p class="note">Intervals are over targets. Every number is defined <a href="#definitions"
style="color: inherit">below</a>; the same tables are in <code>tables/</code>.</p>

$labels

<h2>Every seed</h2>
$figure_psnr_distribution
$figure_psnr_by_step

<h2>What was recovered</h2>
$figure_reconstructions
$spread

<h2>Success</h2>
$figure_success_rate

$spectrum
$unknown

$paired

$defended

<h2>By target</h2>
<details><summary>Table of every target and setting, PSNR in dB</summary>
$targets
</details>

<h2 id="definitions">How each number is defined</h2>
<dl>$definitions</dl>

<h2>What was run</h2>
<dl>$run</dl>
</main>
</body>
</html>
"""
