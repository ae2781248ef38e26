"""Records of an evaluation that never ran, for the tests of its report."""

import json

import numpy as np

METHODS = ["daam", "daam-norm", "rollout", "random"]
STAGES = ["head", "block 2", "block 1"]


def make_photos(n, methods=METHODS, steps=4, seed=0):
    """Make records of photos: ours and its variant are alike and best, then comes rollout, then random."""
    rng = np.random.default_rng(seed)
    share = np.linspace(0, 1, steps + 1)
    photos = []
    for i in range(n):
        curves, scores = {}, {}
        for method, power in zip(methods, (5, 5, 2, 1)):
            fall = {b: 0.9 * (1 - share) ** (power * rng.uniform(0.8, 1.2)) for b in ("mean", "blur")}
            curves[method] = {f"deletion_{b}": f.tolist() for b, f in fall.items()}
            curves[method] |= {f"insertion_{b}": (0.9 - f).tolist() for b, f in fall.items()}
            scores[method] = {name: float(np.mean(curve)) for name, curve in curves[method].items()}
            scores[method] |= {"average_drop": 1 / (1 + power) * rng.uniform(0.9, 1.1), "increase": float(i % 3 == 0)}
            if i % 2 == 0:
                scores[method]["energy"] = power / 6 * rng.uniform(0.9, 1.1)
        record = {"photo": f"cup/{i}.jpg", "class": 0, "name": "cup", "probability": 0.9}
        record |= {"scores": scores, "curves": curves}
        if i < 3:
            record["blocks"] = [scores[method] for method in methods[::-1][:3]]
        photos.append(record)
    return photos


def make_sanity(n, methods=METHODS):
    return [
        {"photo": str(i), "methods": {m: {"flip": 0.9, "class": None, "randomised": [0.8, 0.5, 0.1]} for m in methods}}
        for i in range(n)
    ]


def make_mosaics(n, methods=METHODS):
    """Make records of mosaics: ours is best, and the others are about chance."""
    shares = {m: [0.6 - 0.1 * (i > 0), 0.5 - 0.08 * i, None, 0.25] for i, m in enumerate(methods)}
    names = [[f"cup/{4 * i + j}.jpg" for j in range(4)] for i in range(n)]
    return [{"photo": four[0], "photos": four, "classes": ["cup"] * 4, "shares": shares} for four in names]


def write_run(folder, photos, sanity=(), methods=METHODS, total=20, mosaics=()):
    run = {"model": "tiny", "checkpoint": None, "images": "photos", "photos": total, "methods": methods}
    run |= {"baselines": ["mean", "blur"], "steps": 4, "dtype": "float32", "seed": 0}
    run |= {"sanity": len(sanity), "stages": STAGES}
    (folder / "run.json").write_text(json.dumps(run | {"versions": {}}))
    (folder / "photos.jsonl").write_text("".join(json.dumps(record) + "\n" for record in photos))
    for name, records in {"sanity": sanity, "mosaics": mosaics}.items():
        if records:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run
