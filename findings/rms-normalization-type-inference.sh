#!/usr/bin/env bash
# onnx refuses a valid RMSNormalization whose scale has another type than its input: inference and schema disagree.
#
# Expected: in opset 23 the schema gives X the type T, scale and Y the type V, so fp16 X and fp32 scale make fp32 Y.
# Seen in onnx 1.23.2: full checking refuses the model whatever its output is declared as. Type inference gives Y the
# type of X, the schema V, and "Y has inconsistent type tensor(float16)" is what is said of both. Without inference, the
# checker takes the model; with equal types, inference does.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2
cat >"$folder/try.py" <<'PY'
import onnx

schema = onnx.defs.get_schema("RMSNormalization", 23)
print("schema:", *(f"{each.name} {each.type_str}," for each in schema.inputs), "gives", schema.outputs[0].type_str)


def verdict(scale: str, output: str) -> str:
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
    g (float16[2,4] x, {scale}[4] s) => ({output}[2,4] y) {{ y = RMSNormalization <axis=-1> (x, s) }}"""
    model = onnx.parser.parse_model(text)
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    except onnx.shape_inference.InferenceError as error:
        return "refused" if "inconsistent type" in str(error) else str(error)
    return "taken"


cases = [("float", "float"), ("float", "float16"), ("float16", "float16")]
found = {case: verdict(*case) for case in cases}
for (scale, output), text in found.items():
    print(f"fp16 input, {scale} scale, {output} output: {text}")
types = [each.type_str for each in (*schema.inputs, *schema.outputs)]
raise SystemExit(0 if types == ["T", "V", "V"] and list(found.values()) == ["refused", "refused", "taken"] else 1)
PY
"$folder/env/bin/python" "$folder/try.py" || { echo "this has changed"; exit 1; }
