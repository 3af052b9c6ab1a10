"""Ways to spoil a bundle: by accident, by an editor who counts the checksums anew, and by one who forges stamps too."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tcc.export.decode import decode
from tcc.export.manifest import PLAN, WEIGHTS, Manifest, _digest, file_entry
from tcc.export.stamp import KEY, expected

__all__ = [
    "BODIES",
    "BYTES",
    "HOSTILE",
    "LISTS",
    "Change",
    "edit_graph",
    "expand",
    "forge",
    "mutate",
    "places",
    "recount",
    "rewrite",
    "rezip",
    "seal",
]

Change = Callable[[Path, random.Random], object]

HOSTILE: list[Any] = [
    "../x", "/etc/passwd", "..", "", "\0", "\ud800", "a" * 10_000, -1, 2**31, 2**63, 2**200, 1e308, float("nan"),
    float("inf"), True, None, [], {}, [[]] * 50, {"a": {}}, "weights.safetensors", "manifest.json", "float32", 0,
]  # fmt: skip


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its checksum fit again, as someone who means harm would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    body = {key: value for key, value in document.items() if key not in ("format", "version", "sha256")}
    path.write_text(json.dumps(document | {"sha256": _digest(body)}))


def seal(folder: Path) -> None:
    """Make every size, hash and checksum fit what is in the folder."""

    def change(document: dict[str, Any]) -> None:
        for name in document["files"]:
            if (folder / name).is_file():
                document["files"][name] = vars(file_entry(folder / name))
        for what, name in (("plan", PLAN), ("weights", WEIGHTS)):
            if name in document["files"]:
                document["hashes"][what] = document["files"][name]["sha256"]

    rewrite(folder, change)


def forge(folder: Path) -> None:
    """Let the graphs of an ONNX bundle say of themselves what the manifest says of them."""
    import onnx

    document = json.loads((folder / "manifest.json").read_text())
    fields = {key: value for key, value in document.items() if key not in ("format", "version", "sha256")}
    manifest: Manifest = decode(Manifest, fields, "manifest")
    weights = load_file(folder / WEIGHTS)
    for number, graph in enumerate(manifest.graphs):
        stamp = expected(manifest, number, weights)
        edit_graph(folder / graph.file, lambda m, s=stamp: onnx.helper.set_model_props(m, {KEY: json.dumps(s)}))
    seal(folder)


def edit_graph(path: Path, edit: Callable[[Any], object]) -> None:
    """Change an ONNX graph."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())


def recount(folder: Path) -> None:
    """Let the manifest say how many operators the graphs have now."""
    import onnx

    def change(document: dict[str, Any]) -> None:
        for graph in document["graphs"]:
            graph["operators"] = len(onnx.load(folder / graph["file"], load_external_data=False).graph.node)

    rewrite(folder, change)


def rezip(path: Path, edit: Callable[[dict[str, bytes]], object], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a package anew, with other files in it."""
    with zipfile.ZipFile(path) as package:
        files = {name: package.read(name) for name in package.namelist()}
    edit(files)
    with zipfile.ZipFile(path, "w", compression) as package:
        for name, content in files.items():
            package.writestr(name, content)


def mutate(folder: Path, draw: random.Random) -> str:
    """Spoil a bundle in one way, without and with a fitting checksum of the manifest; returns what was done."""
    kind = draw.choice(["cut", "flip", "swap", "grow", "remove", "overwrite", "field", "value"])
    BYTES.get(kind, _field)(folder, draw)
    return kind


# -- bytes of files


def _any_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def _cut(folder: Path, draw: random.Random) -> None:
    path = _any_file(folder, draw)
    os.truncate(path, draw.randrange(path.stat().st_size))


def _flip(folder: Path, draw: random.Random) -> None:
    path = _any_file(folder, draw)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _swap(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _grow(folder: Path, draw: random.Random) -> None:
    with _any_file(folder, draw).open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 100)))


def _overwrite(folder: Path, draw: random.Random) -> None:
    path = _any_file(folder, draw)
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 16] = draw.randbytes(16)
    path.write_bytes(content)


def _remove(folder: Path, draw: random.Random) -> None:
    _any_file(folder, draw).unlink()


# -- the manifest


def _field(folder: Path, draw: random.Random) -> None:
    """Remove a random field of the manifest, or put something hostile in its place."""

    def change(document: dict[str, Any]) -> None:
        holder, key = draw.choice([(h, k) for h, k in places(document) if k not in ("format", "version", "sha256")])
        if draw.random() < 0.5:
            del holder[key]
        else:
            holder[key] = draw.choice(HOSTILE)

    rewrite(folder, change)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a JSON value: what holds it, and its key there."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items:
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def _in_specs(edit: Callable[[dict[str, Any], random.Random], object]) -> Change:
    """A change of one input, output, slot or tensor of steps."""

    def change(folder: Path, draw: random.Random) -> None:
        def one(document: dict[str, Any]) -> None:
            specs = [spec for what in ("inputs", "outputs", "slots", "tensors") for spec in document[what]]
            edit(draw.choice(specs), draw)

        rewrite(folder, one)

    return change


def _shape(spec: dict[str, Any], draw: random.Random) -> None:
    sizes = list(spec["shape"]) or [1]
    place = draw.randrange(len(sizes))
    other = draw.choice([sizes[place] + 1, sizes[place] - 1, 2 * sizes[place], 0, 2**20, 2**31 - 1, 2**40])
    ways = [[*sizes[:place], other, *sizes[place + 1 :]], [*sizes, 1], sizes[1:], [*sizes, 2**31 - 1], [2**17, 2**17]]
    spec["shape"] = draw.choice([way for way in ways if way != spec["shape"]])
    if "axes" in spec:
        spec["axes"] = [""] * len(spec["shape"])


def _dtype(spec: dict[str, Any], draw: random.Random) -> None:
    kinds = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
    spec["dtype"] = draw.choice([kind for kind in kinds if kind != spec["dtype"]])


def _name(spec: dict[str, Any], draw: random.Random) -> None:
    spec["name"] = draw.choice(
        [spec["name"] + "x", "slot:" + spec["name"], "kept_0", "slot:step", "\ud800", "../x", ""]
    )


def _steps(folder: Path, draw: random.Random) -> None:
    """Another step table, of things that exist."""

    def change(document: dict[str, Any]) -> None:
        steps = document["steps"]
        number, other = draw.sample(range(len(steps)), 2)
        match draw.randrange(5):
            case 0:
                del steps[number]
            case 1:
                steps.append(dict(steps[number]))
            case 2:
                steps[number]["graph"] = (steps[number]["graph"] + 1) % len(document["graphs"])
            case 3:
                steps[number] = {
                    "graph": steps[number]["graph"],
                    "tensors": dict(steps[other]["tensors"]) | {"kept_7": "x"},
                }
            case _:
                names = [spec["name"] for spec in document["tensors"]]
                for key in steps[number]["tensors"]:
                    steps[number]["tensors"][key] = draw.choice(names)

    rewrite(folder, change)


def _graphs(folder: Path, draw: random.Random) -> None:
    """Another list of graphs: of other files or entries, in another order, of other inputs, stores and weights."""

    def change(document: dict[str, Any]) -> None:
        one, other = draw.sample(document["graphs"], 2)
        key = draw.choice(["file+entry", "inputs", "stores", "weights", "order", "hide"])
        if key == "file+entry":
            for part in ("file", "entry"):
                one[part], other[part] = other[part], one[part]
        elif key == "order":
            document["graphs"].reverse()
        elif key == "hide":
            one["inputs"] = [name for name in one["inputs"] if not name.startswith("slot:")]
        else:
            one[key] = draw.choice([one[key][::-1], one[key][1:], one[key] * 2, other[key], [*one[key], "x"]])

    rewrite(folder, change)


def _text(folder: Path, draw: random.Random) -> None:
    """JSON that is not what everybody reads alike."""
    path = folder / "manifest.json"
    text = path.read_text()
    edits = [
        text.replace('"slots":', '"slots": [], "slots":', 1),
        text.replace('"macs": ', '"macs": NaN, "macs": ', 1),
        text.replace('"steps": [', '"steps": [' + "[" * draw.randrange(1, 200_000), 1),
        text.replace('"device": "cpu"', '"device": "cpu", "extra": -Infinity', 1),
        text.replace('"macs": ', '"macs": ' + "9" * draw.randrange(1, 20_000), 1),
        text.replace('"macs": ', '"macs": 1e999, "x": ', 1),
        text.encode("utf-16").decode("latin-1"),
        text + text,
    ]
    path.write_text(draw.choice(edits), encoding="utf-8")


def _kind_of_file(folder: Path, draw: random.Random) -> None:
    """A link, a folder or a pipe where a file is expected."""
    path = _any_file(folder, draw)
    content = path.read_bytes()
    path.unlink()
    match draw.randrange(4):
        case 0:
            (folder / "copy").write_bytes(content)
            path.symlink_to("copy")
        case 1:
            path.symlink_to(draw.choice(["/dev/zero", "/etc/passwd", "/nowhere", path.name]))
        case 2:
            path.mkdir()
        case _:
            os.mkfifo(path)


# -- what a graph of ONNX does


def _added(model: Any, nodes: list[Any], result: str, **constants: list[int]) -> None:
    """Nodes whose result, a number, is added to the model's output, with constants of int64; all is declared."""
    import onnx

    graph, helper = model.graph, onnx.helper
    output = graph.output[0]
    (maker,) = [node for node in graph.node if output.name in node.output]
    inner = f"{output.name} before"
    maker.output[list(maker.output).index(output.name)] = inner
    graph.value_info.add(name=inner).type.CopyFrom(output.type)
    for name, values in constants.items():
        graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values))
    graph.value_info.append(helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, []))
    graph.node.extend([*nodes, helper.make_node("Add", [inner, result], [output.name])])


def _scalar(name: str, number: float) -> Any:
    import onnx

    return onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [number])


def _loop(model: Any) -> None:
    """A loop that runs 2**40 times."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("on", 9), ("sum", 1))]
    outs = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("still", 9), ("more", 1))]
    nodes = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["sum", "start"], ["more"])]
    body = helper.make_graph(nodes, "body", ends, outs)
    model.graph.initializer.extend([_scalar("start", 1.0), helper.make_tensor("often", TensorProto.INT64, [], [2**40])])
    _added(model, [helper.make_node("Loop", ["often", "", "start"], ["extra"], body=body)], "extra")


def _choice(model: Any) -> None:
    """A choice between two graphs."""
    from onnx import TensorProto, helper

    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in ("left", "right")]
    graphs = [helper.make_graph([helper.make_node("Neg", ["start"], [o.name])], o.name, [], [o]) for o in outs]
    node = helper.make_node("If", ["switch"], ["extra"], then_branch=graphs[0], else_branch=graphs[1])
    model.graph.initializer.extend([_scalar("start", 1.0), helper.make_tensor("switch", TensorProto.BOOL, [], [True])])
    _added(model, [node], "extra")


def _swell(model: Any) -> None:
    """A constant of 3 GiB, made of one number."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ConstantOfShape", ["many"], ["much"], value=helper.make_tensor("one", 1, [1], [1.0])),
        helper.make_node("ReduceSum", ["much"], ["extra"], keepdims=0),
    ]
    model.graph.value_info.append(helper.make_tensor_value_info("much", TensorProto.FLOAT, [3 * 2**28]))
    _added(model, nodes, "extra", many=[3 * 2**28])


def expand(model: Any, declared: int = 3 * 2**28, target: str = "many") -> None:
    """A number that is repeated 3 * 2**28 times, in a value that is declared as it is, or otherwise."""
    from onnx import TensorProto, helper

    model.graph.initializer.append(_scalar("start", 1.0))
    nodes = [
        helper.make_node("Expand", ["start", target], ["much"]),
        helper.make_node("ReduceSum", ["much"], ["extra"], keepdims=0),
    ]
    model.graph.value_info.append(helper.make_tensor_value_info("much", TensorProto.FLOAT, [declared]))
    _added(model, nodes, "extra", many=[3 * 2**28])


def _lie(model: Any) -> None:
    """The same in a value that is declared as one number."""
    expand(model, declared=1)


#: What graphs of ONNX are made to do, by name; each was as large and ran as long as it liked once.
BODIES: dict[str, Callable[[Any], None]] = {
    "loop": _loop, "choice": _choice, "constant": _swell, "repeat": expand, "lie": _lie
}  # fmt: skip

#: Ways to spoil the bytes of any file, and the manifest.
BYTES: dict[str, Change] = {
    "cut": _cut, "flip": _flip, "swap": _swap, "grow": _grow, "overwrite": _overwrite, "remove": _remove
}  # fmt: skip
LISTS: dict[str, Change] = {
    "shape": _in_specs(_shape), "dtype": _in_specs(_dtype), "name": _in_specs(_name), "manifest": _field,
    "steps": _steps, "graphs": _graphs, "text": _text, "kind of file": _kind_of_file,
}  # fmt: skip
