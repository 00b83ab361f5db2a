"""A user's mistakes: each is refused in one whole line with exit code 2, writes nothing, and waits for no torch."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from tests.commands import Answer, refusals, run_light
from tests.conftest import Models, Row

FROZEN = Path(__file__).parents[1] / "data" / "cache" / "frozen" / "2"
PRECOMPUTE = "precompute --teacher models/teacher --data prefs.jsonl --cache c"
SAMPLE = f"{PRECOMPUTE} --student models/student"
EVALUATE = (
    "evaluate --student models/student --baseline models/base --teacher models/teacher "
    "--reference models/reference --data prefs.jsonl"
)
DISTILL = "distill --objective dckd --student models/student --cache cache --output out"
CHECKPOINT = "expected a Hugging Face checkpoint directory"
HUB_NAME = (
    "no such directory, and no name that the Hub can have (org/name[@revision]); check the name of the checkpoint"
)
OFFLINE = "HF_HUB_OFFLINE keeps adpa from asking the Hub"
DEVICE = "expected auto, cpu, cuda, or cuda:1 for one of several GPUs"
ENDING = "expected .parquet, or none for a directory; name rows.parquet or rows"
OWN_DIRECTORY = "name a directory of its own for the cache"
NOT_LOCAL = "not a local path; name a file or directory of this machine"
LONG = "x" * 300

VALUES = {
    f"{SAMPLE} --temperature nan": "--temperature nan; expected 0 or more",
    f"{SAMPLE} --temperature inf": "--temperature inf; expected a finite number",
    f"{EVALUATE} --temperature -0.5": "--temperature -0.5; expected 0 or more",
    f"{SAMPLE} --temperature 1e-9": "--temperature 1e-09; expected at least 1e-06, or 0, which is greedy",
    f"{SAMPLE} --sampling-top-p nan": "--sampling-top-p nan; expected more than 0 and at most 1",
    f"{EVALUATE} --sampling-top-p inf": "--sampling-top-p inf; expected more than 0 and at most 1",
    f"{PRECOMPUTE} --top-p nan": "--top-p nan; expected more than 0 and at most 1",
    f"{PRECOMPUTE} --gpu-memory-utilization 90": "--gpu-memory-utilization 90; expected more than 0 and at most 1",
    f"{EVALUATE} --gpu-memory-utilization nan": "--gpu-memory-utilization nan; expected more than 0 and at most 1",
    f"{SAMPLE} --seed -1": "--seed -1; expected at least 0",
    f"{EVALUATE} --seed -7": "--seed -7; expected at least 0",
    f"{SAMPLE} --seed {2**63}": f"--seed {2**63}; expected at most {2**63 - 1}",
    "lab --output o --seed -1": "--seed: [-1]; expected a list of numbers of at least 0 and at most 4294967295",
    "lab --output o --seed 3 --seed 3": "--seed: seed 3 occurs twice; name every seed once",
    "lab --output o --workers 0": "--workers 0; expected at least 1",
    f"{PRECOMPUTE} --top-k 0": "--top-k 0; expected at least 1",
    f"{PRECOMPUTE} --top-k {2**31}": f"--top-k {2**31}; expected at most {2**31 - 1}",
    f"{PRECOMPUTE} --max-model-len -1": "--max-model-len -1; expected at least 1",
    f"{PRECOMPUTE} --batch-tokens -1": "--batch-tokens -1; expected at least 1",
    f"{EVALUATE} --tensor-parallel -2": "--tensor-parallel -2; expected at least 1",
    f"{PRECOMPUTE} --dry-run --probe 0": "--probe 0; expected at least 1",
    f"{PRECOMPUTE} --device gpu": f"--device gpu; {DEVICE}",
    f"{EVALUATE} --device cuda:x": f"--device cuda:x; {DEVICE}",
    f"{PRECOMPUTE} --device meta": f"--device meta; {DEVICE}",
    f"{PRECOMPUTE} --executor ray --workers -1": "--workers -1; expected at least 1",
    f"{PRECOMPUTE} --executor ray --workers 2 --ray-address head": "--ray-address head; expected auto or host:port; "
    "write it as node1:6379",
    f"{PRECOMPUTE} --executor ray --workers 2 --ray-address h:99999": "--ray-address h:99999; expected auto or "
    "host:port; write it as node1:6379",
    f"{PRECOMPUTE} --part 0/2": "--part 0/2; expected i/n with i from 1 to n, such as 1/4",
    f"{PRECOMPUTE} --part 3/2": "--part 3/2; expected i/n with i from 1 to n, such as 1/4",
    f"{PRECOMPUTE} --part two": "--part two; expected i/n with i from 1 to n, such as 1/4",
    f"{PRECOMPUTE} --responses chosn": "--responses chosn: found 'chosn'; expected chosen, rejected, sampled; "
    "did you mean chosen?",
    f"{PRECOMPUTE} --engine hf --tensor-parallel 2": "--tensor-parallel is for vLLM; the engine is hf (as asked); "
    "leave it out",
    "inspect cache --count -3": "--count -3; expected at least 1",
    f"{PRECOMPUTE} --limit 0": "--limit 0; expected at least 1",
    f"{EVALUATE} --limit -5": "--limit -5; expected at least 1",
    f"{PRECOMPUTE} --map ''": "--map '': an empty value; write one, or leave the option out",
    f"{EVALUATE} --map prompt": "--map prompt: found 'prompt'; expected column=name; write it as "
    "prompt=question,chosen=answer_a",
    f"{EVALUATE} --map promt=question": "--map promt=question: found 'promt'; expected one of prompt, chosen, "
    "rejected, system, tools, chat_template_kwargs before =; did you mean prompt?",
}
MODELS = {
    f"{PRECOMPUTE} --teacher models/techer": f"--teacher models/techer: no such directory, and {OFFLINE}; "
    "did you mean models/teacher?",
    f"{PRECOMPUTE} --reference ./models/refrence": "--reference ./models/refrence: no such directory; "
    "did you mean models/reference?",
    f"{SAMPLE} --student /none": "--student /none: no such directory; check the name of the checkpoint",
    f"{PRECOMPUTE} --teacher a/b/c": f"--teacher a/b/c: {HUB_NAME}",
    f"{PRECOMPUTE} --teacher 'a b'": f"--teacher a b: {HUB_NAME}",
    f"{PRECOMPUTE} --teacher org/": f"--teacher org/: {HUB_NAME}",
    f"{PRECOMPUTE} --teacher org/name": f"--teacher org/name: no such directory, and {OFFLINE}; "
    "check the name of the checkpoint, or unset HF_HUB_OFFLINE",
    f"{PRECOMPUTE} --teacher org/name@": "--teacher org/name@: no such directory; found no revision after @; "
    "name one, or leave @ out",
    f"{PRECOMPUTE} --teacher https://huggingface.co/org/name": "--teacher https://huggingface.co/org/name: no such "
    "directory; a model of the Hub is named org/name[@revision]; did you mean org/name?",
    f"{PRECOMPUTE} --teacher prefs.jsonl": f"--teacher prefs.jsonl: it is a file; {CHECKPOINT}; "
    "check the name of the checkpoint",
    f"{PRECOMPUTE} --teacher models/teacher/config.json": f"--teacher models/teacher/config.json: it is a file; "
    f"{CHECKPOINT}; did you mean models/teacher?",
    f"{PRECOMPUTE} --teacher empty": f"--teacher empty: found no config.json; {CHECKPOINT}; check the path",
    f"{PRECOMPUTE} --teacher cache": f"--teacher cache: found no config.json, but a cache; {CHECKPOINT}; "
    "check the path",
    f"{PRECOMPUTE} --teacher run": f"--teacher run: found no config.json; {CHECKPOINT}; "
    "did you mean run/checkpoint-20?",
    f"{PRECOMPUTE} --teacher models": f"--teacher models: found no config.json; {CHECKPOINT}; "
    "did you mean models/base?",
    f"{PRECOMPUTE} --teacher untold": "--teacher untold: found no tokenizer; save one there with "
    "tokenizer.save_pretrained",
    f"{DISTILL} --student untold": "--student untold: found no tokenizer; save one there with "
    "tokenizer.save_pretrained",
    f"{PRECOMPUTE} --teacher run/checkpoint-20": "--teacher run/checkpoint-20: found no weights; expected one of "
    "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json",
    f"{PRECOMPUTE} --teacher loop": "--teacher loop: cannot be read: Too many levels of symbolic links; "
    "check the name of the checkpoint",
    f"{PRECOMPUTE} --teacher {LONG}": f"--teacher {LONG}: cannot be read: File name too long; "
    "check the name of the checkpoint",
    f"{PRECOMPUTE} --reference ./models/../models/teacher": "--reference ./models/../models/teacher: it has the "
    "teacher's weights, so that every advantage would be 0; name the model before preference training",
    f"{EVALUATE} --baseline models/student": "--baseline models/student: it has the weights of --student "
    "models/student, so that there is nothing to compare; name the model before training, or another one",
    f"{EVALUATE} --baseline ./nowhere": "--baseline ./nowhere: no such directory; check the name of the checkpoint",
    f"{EVALUATE} --reference models/teacher": "--reference models/teacher: it has the teacher's weights, so that "
    "every advantage would be 0; name the model before preference training",
    f"{DISTILL} --student models/studnet": f"--student models/studnet: no such directory, and {OFFLINE}; "
    "did you mean models/student?",
    f"{DISTILL} --student cache": f"--student cache: found no config.json, but a cache; {CHECKPOINT}; check the path",
}
DATA = {
    f"{PRECOMPUTE} --data pref.jsonl": "pref.jsonl: no such file or directory; did you mean prefs.jsonl?",
    f"{EVALUATE} --data ./no.parquet": "./no.parquet: no such file or directory; check --data",
    f"{PRECOMPUTE} --data org/pairs": "org/pairs: no such file or directory, and "
    f"{OFFLINE}; check --data, or unset HF_HUB_OFFLINE",
    f"{PRECOMPUTE} --data 'my pairs'": "my pairs: no such file or directory; check --data",
    f"{PRECOMPUTE} --data models/teacher": "models/teacher: it is a model; expected preference pairs; check --data",
    f"{EVALUATE} --data cache": "cache: it is a cache; expected preference pairs; check --data",
    f"{PRECOMPUTE} --data /dev/null": "/dev/null: expected a file; found a device; write its content to a file first",
    f"{PRECOMPUTE} --data none.jsonl": "none.jsonl: found no rows: the file is empty; check --data",
    f"{PRECOMPUTE} --data loop": "loop: cannot be read (Too many levels of symbolic links); check --data",
    f"{PRECOMPUTE} --data {LONG}": f"{LONG}: cannot be read (File name too long); check --data",
    f"{PRECOMPUTE} --data picture.png": (
        "picture.png: expected JSONL, JSON, CSV or Parquet; found a picture (PNG); check --data"
    ),
    f"{PRECOMPUTE} --data utf16.jsonl": "utf16.jsonl: expected UTF-8 text; found UTF-16; save the file as UTF-8",
    f"{PRECOMPUTE} --data null.jsonl": (
        "null.jsonl line 1: `rejected` is null; expected chat messages or a string; mend or remove the row, "
        "or pass --drop-invalid"
    ),
    f"{PRECOMPUTE} --data names.jsonl": (
        "names.jsonl line 1: found the columns question, answer_a, answer_b; expected `chosen` and "
        "`rejected`; a row needs a prompt and two responses: name them with "
        "--map prompt=question,chosen=NAME,rejected=NAME"
    ),
    f"{PRECOMPUTE} --data empty": (
        "empty: expected a folder of JSONL, JSON, CSV or Parquet files, or one saved by datasets.save_to_disk; "
        "found an empty one; give --data a file or such a folder"
    ),
    f"{EVALUATE} --data cut.csv.gz": "cut.csv.gz: the compressed file is damaged or cut off; copy it again",
    f"{PRECOMPUTE} --data prefs.jsonl:main": "prefs.jsonl:main: no such file or directory; give --data prefs.jsonl: "
    "only data sets of the Hub have configurations and revisions",
    f"{PRECOMPUTE} --data org/pairs:a:b": "org/pairs:a:b: no such file or directory, and no name that the Hub can "
    "have; check --data",
    f"{EVALUATE} --split test": "prefs.jsonl: found --split test; its only split is train; leave --split out",
    f"{PRECOMPUTE} --map prompt=question": (
        "prefs.jsonl line 1: found no column `question` for --map prompt=question among the columns prompt, chosen, "
        "rejected (first of 3 invalid rows; columns of --map: 3); check --map"
    ),
    f"{EVALUATE} --data table.csv --map prompt=question,chosen=answer": (
        "table.csv: found no column `answer` for --map chosen=answer among the columns question, answer_a, answer_b; "
        "did you mean answer_a?"
    ),
    f"{PRECOMPUTE} --data table.csv --map prompt=question,chosen=answer_a": (
        "table.csv: found the columns prompt, chosen, answer_b; expected `rejected`; name it with "
        "--map chosen=answer_a,prompt=question,rejected=NAME"
    ),
}
CACHES = {
    "inspect cach": "cach: no cache there; did you mean cache?",
    "inspect cache/responses": "cache/responses: no cache there; did you mean cache?",
    "cache ls prefs.jsonl": "prefs.jsonl: it is a file; expected the directory of a cache; check the path",
    "cache gc models/teacher": "models/teacher: no cache there, but a model; make it with adpa precompute, "
    "or check the path",
    "cache merge cache empty": "empty: no cache there; make it with adpa precompute, or check the path",
    f"{DISTILL} --cache run": "run: no cache there; make it with adpa precompute, or check the path",
    f"{DISTILL} --cache models/teacher": "models/teacher: no cache there, but a model; make it with adpa precompute, "
    "or check the path",
    f"{DISTILL} --cache few": "few: the cache has no rejected responses; run adpa precompute --responses rejected",
    f"{DISTILL} --objective adpa --cache few": "few: the cache has no sampled responses; run adpa precompute "
    "with --student",
    f"{DISTILL} --objective kd --cache few": "few: found no scorings; make one with adpa precompute",
    f"{DISTILL} --objective adpa --scoring 227c": "cache: no scoring has the signals that are needed: scoring "
    "227c2b4372d065c5 has no reference, hence no advantages; run adpa precompute with these responses, and with "
    "--reference for advantages",
}
OUTPUTS = {
    f"{PRECOMPUTE} --cache prefs.jsonl": "--cache prefs.jsonl: it is not a directory; name another directory",
    f"{PRECOMPUTE} --cache models/teacher": f"--cache models/teacher: it is a model; {OWN_DIRECTORY}",
    f"{EVALUATE} --cache loop": "--cache loop: Too many levels of symbolic links; name another place",
    f"{EVALUATE} --cache {LONG}": f"--cache {LONG}: File name too long; name another place",
    f"{PRECOMPUTE} --cache broken": "--cache broken: it is a broken link; name another directory",
    f"{PRECOMPUTE} --cache /proc/c": "--cache /proc/c: /proc cannot be written; name another directory",
    f"{PRECOMPUTE} --cache s3:/bucket/c": "--cache s3:/bucket/c: not a local path; write both slashes of a URL, and in "
    "Python UPath('s3://bucket/folder')",
    f"{DISTILL} --output s3://bucket/run": f"--output s3:/bucket/run: {NOT_LOCAL}",
    f"{EVALUATE} --report gs://bucket/r.json": f"--report gs:/bucket/r.json: {NOT_LOCAL}",
    "inspect cache --html https://host/page.html": f"--html https:/host/page.html: {NOT_LOCAL}",
    "cache export cache --output s3://bucket/rows": f"--output s3:/bucket/rows: {NOT_LOCAL}",
    "lab --output file:///study": f"--output file:/study: {NOT_LOCAL}",
    f"{PRECOMPUTE} --report /proc/r.json": "--report /proc/r.json: cannot be written there; name a file in an existing "
    "directory",
    "cache ls cache --report /dev/fd/99": "--report /dev/fd/99: cannot be written there; name a file in an existing "
    "directory",
    f"{DISTILL} --output cache": "--output cache: lies in the cache cache; name a place outside of it",
    f"{DISTILL} --output cache/../cache/out": "--output cache/../cache/out: lies in the cache cache; "
    "name a place outside of it",
    f"{DISTILL} --output prefs.jsonl": "--output prefs.jsonl: it is not a directory; name another directory",
    f"{DISTILL} --output run": "--output run: not empty, found checkpoint-10; name another directory",
    "inspect cache --html cache/page.html": "--html cache/page.html: lies in the cache cache; "
    "name a place outside of it",
    "inspect cache --html no/page.html": "--html no/page.html: cannot be written there; name a file in an existing "
    "directory",
    f"inspect cache --html {LONG}": f"--html {LONG}: File name too long; name another place",
    "cache export cache --output rows.csv": f"--output rows.csv: found the ending .csv; {ENDING}",
    "cache export cache --output rows.jsonl": f"--output rows.jsonl: found the ending .jsonl; {ENDING}",
    "cache export cache --output rows.parquet.gz": f"--output rows.parquet.gz: found the ending .gz; {ENDING}",
    "cache export cache --output rows.ARROW": f"--output rows.ARROW: found the ending .ARROW; {ENDING}",
    "cache export cache --output cache/rows": "--output cache/rows: lies in the cache cache; "
    "name a place outside of it",
    "lab --output prefs.jsonl": "--output prefs.jsonl: it is not a directory; name another directory",
    "lab --output cache": "--output cache: a cache, and no study; name another directory",
    "lab --output run": "--output run: not empty, and no study; name another directory",
}
COMMAND_LINES = {
    "--bogus": "no option --bogus; see adpa --help",
    "precomptue --teacher T": "no command 'precomptue'; did you mean precompute?",
    "precompute --teacher T": "--data and --cache are missing; see adpa precompute --help",
    "precompute --techer T --data prefs.jsonl --cache c": "no option --techer; did you mean --teacher?",
    f"{PRECOMPUTE} --teach T": "no option --teach; did you mean --teacher?",
    f"{PRECOMPUTE} --dat=d": "no option --dat; did you mean --data?",
    f"{PRECOMPUTE} -top-k 5": "no option -top-k; did you mean --top-k?",
    "distill --objective dckd --cache cache": "--student and --output are missing; see adpa distill --help",
    "cache": "a command is missing: ls, verify, gc, pack, export, merge; see adpa cache --help",
    "cache sl cache": "no command 'sl'; see adpa cache --help",
    "precompute --cache=": "--cache '': an empty value; write one, or leave the option out",
    "lab --study ''": "--study '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --cache ''": "--cache '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --reference ''": "--reference '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --data ''": "--data '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --split ' '": "--split ' ': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --report ''": "--report '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --config ''": "--config '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --engine-arg ''": "--engine-arg '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --student ''": "--student '': an empty value; write one, or leave the option out",
    "cache ls ''": "CACHE '': an empty value; write one, or leave the option out",
    f"{PRECOMPUTE} --config list.yaml": (
        "--config list.yaml: found a list; expected a mapping; write lines such as name: value"
    ),
    f"{PRECOMPUTE} --config unknown.yaml": (
        "--config unknown.yaml: adpa precompute has no option 'top-q'; did you mean top-k?"
    ),
    "precompute --config text.yaml": "--config text.yaml: top-k many; expected a whole number",
    f"{PRECOMPUTE} --config nowhere.yaml": "--config nowhere.yaml: No such file or directory; check --config",
    f"{PRECOMPUTE} --config empty": "--config empty: Is a directory; check --config",
    f"{PRECOMPUTE} --config picture.png": "--config picture.png: not a text file; name a YAML file in UTF-8",
    f"{PRECOMPUTE} --top-k many": "--top-k many; expected a whole number",
    f"{PRECOMPUTE} --engine vlm": "--engine vlm; expected one of auto, hf, vllm; did you mean vllm?",
    f"{PRECOMPUTE} --dtype bf16": (
        "--dtype bf16; expected one of auto, float32, bfloat16, float16; did you mean bfloat16?"
    ),
    f"{PRECOMPUTE} --chat-template-kwargs '{{'": (
        "--chat-template-kwargs: '{' is no JSON; write --chat-template-kwargs '{\"name\": value}'"
    ),
    f"{PRECOMPUTE} --chat-template-kwargs '[1]'": (
        "--chat-template-kwargs: '[1]' is no JSON object; write --chat-template-kwargs '{\"name\": value}'"
    ),
    f"{PRECOMPUTE} --probe 4": "--probe 4 without --dry-run; a probe scores a few responses and writes nothing",
    f"{PRECOMPUTE} --responses sampled": (
        "--responses sampled without --student; sampled responses need the student that samples them; a "
        "student only samples"
    ),
    f"{PRECOMPUTE} --max-length 3": (
        "--max-prompt-length 1024 with --max-length 3; expected 0 < max-prompt-length < max-length; leave "
        "room for the response"
    ),
    f"{PRECOMPUTE} --workers 2": "--workers 2 without --executor ray; add it, or leave this out",
    f"{PRECOMPUTE} --report nowhere/report.json": (
        "--report nowhere/report.json: cannot be written there; name a file in an existing directory"
    ),
    f"{PRECOMPUTE} --report prefs.jsonl": "--report prefs.jsonl: --data names it too; name another file",
    f"{PRECOMPUTE} --report empty": "--report empty: cannot be written there; name a file in an existing directory",
    f"{DISTILL} --report cache/report.json": (
        "--report cache/report.json: lies in the cache cache; name a place outside of it"
    ),
    f"{PRECOMPUTE} --teacher models/teacher --report models/teacher/config.json": (
        "--report models/teacher/config.json: one of the files of --teacher models/teacher; name a new file"
    ),
    "cache merge cache cache": "cache: the same cache as cache; name another one",
}
TRAINING = {
    f"{DISTILL} --objective dpo": "--objective dpo; expected one of sft, kd, dckd, adpa; did you mean adpa?",
    f"{DISTILL} --on sampled": "--on sampled with dckd, whose responses are fixed; leave it out, or use kd or adpa",
    f"{DISTILL} --objective kd --kl-weight nan": "--kl-weight nan; expected 0 or more",
    f"{DISTILL} --learning-rate 0": "--learning-rate 0; expected more than 0",
    f"{DISTILL} --logging-steps 0": "--logging-steps 0; expected at least 1",
    f"{DISTILL} --logging-steps -1": "--logging-steps -1; expected at least 1",
    f"{DISTILL} --seed -1": "--seed -1; expected at least 0",
    f"{DISTILL} --warmup-steps -1": "--warmup-steps -1; expected at least 0",
    f"{DISTILL} --save-steps -1": "--save-steps -1; expected at least 0",
    f"{DISTILL} --num-train-epochs inf": "--num-train-epochs inf; expected a finite number",
    f"{DISTILL} --max-steps 0": "--max-steps 0; expected at least 1; leave it out for no limit",
    f"{DISTILL} --plausibility 1": "--plausibility 1; expected at least 0 and less than 1",
    f"{DISTILL} --batch-size 0": "--batch-size 0; expected at least 1",
    f"{DISTILL} --batch-size 6 --micro-batch-size 4": (
        "--micro-batch-size 4 does not divide the 6 examples of a step and rank; choose a divisor"
    ),
    f"{DISTILL} --lora-rank 0": "--lora-rank 0; expected at least 1",
    f"{DISTILL} --lora-target q_proj": "--lora-target without --lora-rank; add a rank, such as --lora-rank 16",
    f"{DISTILL} --report-to wand": "--report-to wand: no tracker 'wand'; did you mean wandb?",
    f"{DISTILL} --report-to wandb": "--report-to wandb needs wandb, which is not installed; pip install wandb",
    f"{DISTILL} --lr-scheduler-type cosin": (
        "--lr-scheduler-type cosin; expected one of linear, cosine, cosine_with_min_lr, constant, "
        "constant_with_warmup, polynomial, inverse_sqrt; did you mean cosine?"
    ),
    f"{DISTILL} --lr-scheduler-type cosine_with_min_lr": (
        "--lr-scheduler-type cosine_with_min_lr with no smallest rate; add --set "
        "lr_scheduler_kwargs={min_lr_rate: 0.1}, a share of --learning-rate, or {min_lr: 1e-6}"
    ),
    f"{DISTILL} --set warmup_ratoi=1": (
        "--set warmup_ratoi=1: transformers.TrainingArguments has no field 'warmup_ratoi'; did you mean --warmup-steps?"
    ),
    f"{DISTILL} --set adam_beta1=abc": "--set adam_beta1=abc; expected a number",
    f"{DISTILL} --set optim=adamw_troch": "--set optim=adamw_troch: no such value; did you mean adamw_torch?",
    f"{DISTILL} --set output_dir=x": "--set output_dir=x: --output says where; leave it out",
    f"{DISTILL} --set nonsense": "--set nonsense; expected key=value with a field of transformers.TrainingArguments",
    f"{DISTILL} --resume-from-checkpoint nowhere": (
        "--resume-from-checkpoint nowhere: no such directory; name a checkpoint, or last"
    ),
    f"{DISTILL} --resume-from-checkpoint empty": (
        "--resume-from-checkpoint empty: found no trainer_state.json that can be read; name a complete "
        "checkpoint, or last"
    ),
    f"{DISTILL} --device gpu": "--device gpu; expected auto, cpu or cuda; choose a GPU by CUDA_VISIBLE_DEVICES",
    f"{DISTILL} --dtype float16": (
        "--dtype float16 loses small gradients in the loss head; use --bf16, or --dtype float32"
    ),
}
MISTAKES = VALUES | MODELS | DATA | CACHES | OUTPUTS | COMMAND_LINES | TRAINING


@pytest.fixture(scope="module")
def desk(models: Models, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with models, data and a cache, and a few things that are none of them."""
    desk = tmp_path_factory.mktemp("desk")
    pairs = "".join(json.dumps(row) + "\n" for row in preference_rows[:3])
    (desk / "prefs.jsonl").write_text(pairs)
    (desk / "utf16.jsonl").write_bytes(pairs.encode("utf-16"))
    (desk / "null.jsonl").write_text(json.dumps(preference_rows[0] | {"rejected": None}) + "\n")
    (desk / "names.jsonl").write_text(json.dumps({"question": "?", "answer_a": "Yes.", "answer_b": "No."}) + "\n")
    (desk / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (desk / "table.csv").write_text("question,answer_a,answer_b\n?,Yes.,No.\n")
    (desk / "cut.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\n", mtime=0)[:-4])
    (desk / "list.yaml").write_text("- teacher: T\n")
    (desk / "unknown.yaml").write_text("teacher: T\ntop-q: 3\n")
    (desk / "text.yaml").write_text("teacher: T\ndata: prefs.jsonl\ncache: c\ntop-k: many\n")
    (desk / "models").mkdir()
    named = {"teacher": models.teacher, "reference": models.reference, "student": models.student}
    for name, directory in {**named, "base": models.other_student}.items():
        (desk / "models" / name).symlink_to(directory)
    shutil.copytree(FROZEN, desk / "cache")
    (desk / "few" / "responses").mkdir(parents=True)
    for file in (FROZEN / "responses").glob("chosen-*"):
        shutil.copy(file, desk / "few" / "responses")
    for step in (10, 20):
        (desk / "run" / f"checkpoint-{step}").mkdir(parents=True)
        shutil.copy(models.student / "config.json", desk / "run" / f"checkpoint-{step}")
    (desk / "untold").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(models.student / name, desk / "untold")
    (desk / "empty").mkdir()
    (desk / "none.jsonl").touch()
    (desk / "loop").symlink_to("loop")
    (desk / "broken").symlink_to("gone")
    return desk


@pytest.fixture(scope="module")
def answers(desk: Path) -> dict[str, Answer]:
    """The answers to all mistakes; what lies on the desk stays as it was."""
    before = contents(desk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        said = run_light(MISTAKES, desk)
    assert contents(desk) == before
    return dict(zip(MISTAKES, said, strict=True))


def contents(folder: Path) -> dict[Path, int]:
    """The files and folders in a folder, and when they were changed."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_whole_line_before_torch_is_imported(command: str, answers: dict[str, Answer]) -> None:
    assert answers[command] == Answer(2, "", f"adpa: {MISTAKES[command]}\n")


def test_the_hub_that_does_not_answer_is_one_line_at_once(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    commands = [f"{PRECOMPUTE} --teacher org/name", f"{EVALUATE} --baseline org/name@v1", f"{PRECOMPUTE} --data org/x"]
    network = "the Hub cannot be reached; check"
    assert refusals(commands, desk) == [
        f"adpa: --teacher org/name: no such directory, and {network} the name of the checkpoint, and the network\n",
        f"adpa: --baseline org/name@v1: no such directory, and {network} the name of the checkpoint, and the network\n",
        f"adpa: org/x: no such file or directory, and {network} --data, and the network\n",
    ]
