"""Puts what scripts/gpu-check left in a folder into one result.json and result.md: python gpu_report.py FOLDER COMMIT"""

import datetime
import json
import pathlib
import sys


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
        same = "the same bits in all but the token path op by op and wgmma" if switches["same_bits"] else "**the bits differ**"
        lines += ["", f"Early launches and branches of recorded work, the token path's launches and wgmma, base, f16, in this order; {same}:", "", "| | encode, ms | interaction, ms |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['encode']:.3f} | {r['interact']:.3f} |" for r in switches["runs"]]
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
