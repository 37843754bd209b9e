"""Puts what the steps of scripts/gpu-check left in a folder, as far as they are done, into
result.json and result.md of another: python gpu_report.py FOLDER RESULTS COMMIT"""

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


def parsed(text):
    """What a text holds as JSON; none if it is empty or was not written to its end."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def said(failure):
    """The beginning of a failure, as a cell of a table."""
    return " ".join(failure.split())[:80].replace("|", "/")


# Exit statuses that scripts/gpu-check and timeout give a meaning.
MEANING = {0: "passed", None: "**was not finished**", 75: "**not done: no time left**", 124: "**ended at its limit of time**", 137: "**killed at its limit of time**"}


def main(folder, out, commit):
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    read = lambda name: (folder / name).read_text() if (folder / name).exists() else ""
    read_json = lambda name: parsed(read(name))
    # One that is being written is empty.
    steps = {p.stem: parsed(p.read_text()) for p in sorted(folder.glob("*.rc"))}
    info = read("info.log").splitlines()
    gpu, driver = (info[0].split(", ") + ["", ""])[:2] if info else ("", "")
    notes = read("notes").splitlines()
    result = {"date": datetime.date.today().isoformat(), "commit": commit, "gpu": gpu, "driver": driver, "notes": notes, "steps": steps, "info": info}
    lines = [f"# {gpu}, driver {driver}" if gpu else "# The step info has not run", "", f"{result['date']}, commit {commit}. Step: exit status.", ""]
    lines += [f"**{note}.**\n" for note in notes]
    lines += [f"- {name}: {MEANING.get(rc, f'**failed ({rc})**')}" for name, rc in steps.items()]
    for precision in ("f32", "tf32", "ieee", "f16", "bf16"):
        last = [l for l in read(f"verify-{precision}.log").splitlines() if " passed, " in l]
        lines += [f"- verify {precision}: {last[-1]}"] if last else []
    if peer := read_json("peer.json"):
        result["comparison"] = peer
        lines += ["", f"Base, {peer['size']}^3, beside PyTorch {peer['torch']} in one run:", "", "| | encode, ms | interaction, ms | memory, GB |", "|---|---|---|---|"]
        for side in ("prism", "peer"):
            for name, r in peer[side].items():
                cells = [said(r["failed"]), "", ""] if "failed" in r else [f"{r['encode'] * 1e3:.2f}", f"{r['interact'] * 1e3:.2f}", f"{r['peak_gb']:.2f}"]
                lines.append(f"| {'PyTorch' if side == 'peer' else side} {name} | " + " | ".join(cells) + " |")
        lines += ["", "| | training step, ms | memory, GB |", "|---|---|---|"]
        for side in ("prism_step", "peer_step"):
            for name, r in peer.get(side, {}).items():
                cells = [said(r["failed"]), ""] if "failed" in r else [f"{r['step'] * 1e3:.1f}", f"{r['peak_gb']:.2f}"]
                lines.append(f"| {'PyTorch' if side == 'peer_step' else 'prism'} {name} | " + " | ".join(cells) + " |")
        lines += [""] + [f"{w}: {b['ratio']:.1f}x the best of PyTorch ({b['peer']})" for w in ("encode", "interact", "step") if (b := peer.get(f"best_{w}"))]
    if switches := read_json("switches.json"):
        result["switches"] = switches
        same = {
            True: "the same bits in all but the token path op by op, the table's variants and wgmma",
            False: "**the bits differ**",
            None: "**not all runs were made**",
        }[switches["same_bits"]]
        lines += ["", f"Early launches and branches of recorded work, the token path's launches, the table of variants and wgmma, base, f16, in this order; {same}:", "", "| | encode, ms | interaction, ms |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['encode']:.3f} | {r['interact']:.3f} |" for r in switches["runs"]]
    if recorded := read_json("recorded.json"):
        result["recorded"] = recorded
        same = {True: "the same losses and norms", False: "**the losses or the norms differ**", None: "**not all runs were made**"}[recorded["same_losses"]]
        lines += ["", f"Training steps op by op and recorded, base, {recorded['precision']}, one item, in this order; {same}:", "", "| | step, ms | memory, GB |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['step'] * 1e3:.2f} | {(r['device_bytes'] or 0) / 1e9:.2f} |" for r in recorded["runs"]]
    if trial := read_json("trial.json"):
        result["trial"] = trial
        dice = "; validation Dice " + ", ".join(f"{d:.3f} (step {s})" for s, d in trial["validation"]) if trial["validation"] else ""
        lines += ["", f"Training the small network on synthetic cases, {trial['precision']}, for {trial['seconds']:.0f} s: {trial['steps']} steps, {trial['step'] * 1e3:.1f} ms in the median"]
        lines[-1] += f" ({trial['step_p90'] * 1e3:.1f} ms p90), loss {trial['loss'][0]:.3f} to {trial['loss'][1]:.3f}{dice}."
    for precision in ("f16", "wgmma", "f32"):
        if tried := read_json(f"variants-{precision}.json"):
            result[f"variants_{precision}"] = tried
            lines += ["", f"## Variants, {precision}", ""] + choices_of(tried)
    if "tune" in steps:
        result["tune"] = read("tune.log").splitlines()
    for precision in ("f16", "wgmma", "f32", "tf32"):
        text = read(f"kernels-{precision}.log").strip().splitlines()
        if text and (kernels := parsed(text[-1])):
            result[f"kernels_{precision}"] = kernels
            lines += ["", f"## Kernels, {precision}", ""] + text[:-1]
    for name, text in (("result.json", json.dumps(result, indent=1)), ("result.md", "\n".join(lines))):
        (out / name).write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
