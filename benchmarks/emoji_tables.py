"""The figures of benchmarks/emoji.py as markdown."""

from __future__ import annotations

from typing import Any

from unclip.evaluation.scores import markdown_table

TITLES = {
    "retrieval": "Text to image, held-out captions",
    "decoder": "Decoder alone, from true image embeddings",
    "upsamplers": "Upsamplers alone",
}


def report(results: dict[str, Any]) -> str:
    """The tables, as markdown."""
    tables = {"retrieval": _retrieval_table, "decoder": _decoder_table}
    parts = []
    for name, title in TITLES.items():
        if name in results:
            data = results[name]
            note = "" if data["judge"] else " No second CLIP was given: own grades its own work."
            about = f"{data['model']}, {data['seconds']:.0f} s in this run."
            about += note if name in tables else ""
            parts.append(f"### {title}\n\n{about}\n\n{tables.get(name, _upsampler_table)(data)}")
    return "\n\n".join(parts)


def _retrieval_table(data: dict[str, Any]) -> str:
    rows = []
    for judge in [j for j in ("judge", "own") if j in data["by"]]:
        for group, scores in data["by"][judge]["groups"].items():
            made, real = scores["made"], scores["real"]
            ratio = f"{made['top5'] / real['top5']:.2f}" if real["top5"] else "–"
            top5 = f"{_percent(made['top5'])} ± {100 * made['top5_error']:.1f}"
            rows.append(
                [
                    judge,
                    group,
                    str(made["pictures"]),
                    _percent(made["top1"]),
                    top5,
                    _percent(real["top1"]),
                    _percent(real["top5"]),
                    ratio,
                ]
            )
    header = ["CLIP", "pictures", "N", "top-1", "top-5", "real top-1", "real top-5", "top-5 ratio"]
    lines = [markdown_table(header, rows), ""]
    lines.append(
        f"{data['samples']} samples a caption, candidates=1, "
        f"prior_candidates={data['prior_candidates']}."
    )
    twins = {judge: scores["captions_with_twins"] for judge, scores in data["by"].items()}
    lines += [
        f"{count} captions have the same embedding as another by {judge} and do not compete."
        for judge, count in twins.items()
        if count
    ]
    return "\n".join(lines)


def _decoder_table(data: dict[str, Any]) -> str:
    rows = [
        [
            judge,
            source,
            str(scores.get("pictures", "")),
            _percent(scores["nearest"]) if "nearest" in scores else "",
            f"{scores['cosine']:.3f}",
        ]
        for judge in ("judge", "own")
        for source, scores in data["by"].get(judge, {}).items()
    ]
    header = ["CLIP", "picture", "N", "nearest to its own", "cosine to its own"]
    return markdown_table(header, rows)


def _upsampler_table(data: dict[str, Any]) -> str:
    rows = [
        [
            span,
            str(scores["pictures"]),
            "+".join(map(str, scores["steps"])),
            f"{scores['psnr']:.2f}",
            f"{scores['psnr_bicubic']:.2f}",
            f"{scores['psnr'] - scores['psnr_bicubic']:+.2f}",
            f"{scores['gradient']:.3f}",
            f"{scores['gradient_bicubic']:.3f}",
        ]
        for span, scores in data["spans"].items()
    ]
    header = ["px", "N", "steps", "PSNR dB", "bicubic", "gain", "gradient / real", "bicubic's"]
    return markdown_table(header, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
