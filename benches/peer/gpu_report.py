"""Puts what scripts/gpu-check left in a folder into one result.json and result.md:
python gpu_report.py FOLDER COMMIT"""

import datetime
import json
import pathlib
import sys


def choices_of(tried):
    """Lines on the variants of kernels: where another than the rule's is the best, the largest gain
    first."""
    rows, count, wrong = [], 0, [p["problem"] for p in tried["problems"] if any(e is None or e > p["tolerance"] for e in p["errors"])]
    for problem in tried["problems"]:
        for choice in problem["choices"]:
            count += 1
            if choice["best"]:
                rows.append((problem["problem"], choice["key"], choice["variants"][0], choice["variants"][choice["best"]]))
    rows.sort(key=lambda r: r[3]["seconds"] - r[2]["seconds"])
    lines = [f"The rule's variant is the best in {count - len(rows)} of {count} choices. " + (f"**Wrong: {', '.join(wrong)}.**" if wrong else "All that were judged are right."), ""]
    if rows:
        lines += ["| problem | choice | the rule's | predicted, us | measured, us | the best | predicted, us | measured, us | gain, us |", "|" + "---|" * 9]
    for problem, key, rule, best in rows:
        cells = [f"{v['name']} | {v['predicted'] * 1e6:.1f} | {v['seconds'] * 1e6:.1f}" for v in (rule, best)]
        lines.append(f"| {problem} | {key} | {' | '.join(cells)} | {(rule['seconds'] - best['seconds']) * 1e6:.1f} |")
    return lines


def main(folder, commit):
    folder = pathlib.Path(folder)
    read = lambda name: (folder / name).read_text() if (folder / name).exists() else ""
    steps = {p.stem: int(p.read_text()) for p in sorted(folder.glob("*.rc"))}
    info = read("info.log").splitlines()
    gpu, driver = (info[0].split(", ") + ["", ""])[:2] if info else ("", "")
    result = {"date": datetime.date.today().isoformat(), "commit": commit, "gpu": gpu, "driver": driver, "steps": steps, "info": info}
    lines = [f"# {gpu}, driver {driver}", "", f"{result['date']}, commit {commit}. Step: exit status.", ""]
    lines += [f"- {name}: {'passed' if rc == 0 else f'**failed ({rc})**'}" for name, rc in steps.items()]
    for precision in ("f32", "tf32", "ieee", "f16", "bf16"):
        last = [l for l in read(f"verify-{precision}.log").splitlines() if " passed, " in l]
        lines += [f"- verify {precision}: {last[-1]}"] if last else []
    if read("peer.json"):
        peer = result["comparison"] = json.loads(read("peer.json"))
        lines += ["", f"Base, {peer['size']}^3, beside PyTorch {peer['torch']} in one run:", "", "| | encode, ms | interaction, ms | memory, GB |", "|---|---|---|---|"]
        for side in ("prism", "peer"):
            for name, r in peer[side].items():
                cells = [r["failed"][:80], "", ""] if "failed" in r else [f"{r['encode'] * 1e3:.2f}", f"{r['interact'] * 1e3:.2f}", f"{r['peak_gb']:.2f}"]
                lines.append(f"| {'PyTorch' if side == 'peer' else side} {name} | " + " | ".join(cells) + " |")
        lines += ["", "| | training step, ms | memory, GB |", "|---|---|---|"]
        for side in ("prism_step", "peer_step"):
            for name, r in peer.get(side, {}).items():
                cells = [r["failed"][:80], ""] if "failed" in r else [f"{r['step'] * 1e3:.1f}", f"{r['peak_gb']:.2f}"]
                lines.append(f"| {'PyTorch' if side == 'peer_step' else 'prism'} {name} | " + " | ".join(cells) + " |")
        lines += [""] + [f"{w}: {b['ratio']:.1f}x the best of PyTorch ({b['peer']})" for w in ("encode", "interact", "step") if (b := peer.get(f"best_{w}"))]
    if read("switches.json"):
        switches = result["switches"] = json.loads(read("switches.json"))
        same = "the same bits in all but the token path op by op, the table's variants and wgmma" if switches["same_bits"] else "**the bits differ**"
        lines += ["", f"Early launches and branches of recorded work, the token path's launches, the table of variants and wgmma, base, f16, in this order; {same}:", "", "| | encode, ms | interaction, ms |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['encode']:.3f} | {r['interact']:.3f} |" for r in switches["runs"]]
    if read("recorded.json"):
        recorded = result["recorded"] = json.loads(read("recorded.json"))
        same = "the same losses" if recorded["same_losses"] else "**the losses differ**"
        lines += ["", f"Training steps op by op and recorded, base, {recorded['precision']}, one item, in this order; {same}:", "", "| | step, ms | memory, GB |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['step'] * 1e3:.2f} | {(r['device_bytes'] or 0) / 1e9:.2f} |" for r in recorded["runs"]]
    if read("trial.json"):
        trial = result["trial"] = json.loads(read("trial.json"))
        dice = "; validation Dice " + ", ".join(f"{d:.3f} (step {s})" for s, d in trial["validation"]) if trial["validation"] else ""
        lines += ["", f"Training the small network on synthetic cases, {trial['precision']}, for {trial['seconds']:.0f} s: {trial['steps']} steps, {trial['step'] * 1e3:.1f} ms in the median"]
        lines[-1] += f" ({trial['step_p90'] * 1e3:.1f} ms p90), loss {trial['loss'][0]:.3f} to {trial['loss'][1]:.3f}{dice}."
    for precision in ("f16", "wgmma", "f32"):
        if read(f"variants-{precision}.json"):
            tried = result[f"variants_{precision}"] = json.loads(read(f"variants-{precision}.json"))
            lines += ["", f"## Variants, {precision}", ""] + choices_of(tried)
    if "tune" in steps:
        result["tune"] = read("tune.log").splitlines()
    for precision in ("f16", "wgmma", "f32", "tf32"):
        text = read(f"kernels-{precision}.log").strip().splitlines()
        if text and text[-1].startswith("{"):
            result[f"kernels_{precision}"] = json.loads(text[-1])
            lines += ["", f"## Kernels, {precision}", ""] + text[:-1]
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "result.md").write_text("\n".join(lines) + "\n")
    print(folder / "result.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
