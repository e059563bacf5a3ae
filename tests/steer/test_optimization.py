"""Editing in closed form: the formulas on known truth, and facts edited in small models without changing them."""

import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench import measure
from workbench.model.edit import edited
from workbench.steer import optimization
from workbench.steer.optimization import editing, requests, values
from workbench.steer.optimization.rows import forward

TEXT = [
    " ".join(f"w{k}" for k in torch.randint(4, 64, (12,), generator=torch.Generator().manual_seed(i)).tolist())
    for i in range(20)
]
FACT = {"prompt": [row["clean"] for row in copying(3)], "subject": "w4", "target_new": "w7"}  # the model says w6
EASY = {"text": [*TEXT, *(row["corrupted"] for row in copying(40, seed=8))], "keep": ()}


@pytest.fixture(autouse=True)
def unchanged(request):
    """No call changes the model, whether it returns or raises: every bit of every weight."""
    names = [name for name in ("llama", "trained", "tiny") if name in request.fixturenames]
    models = [request.getfixturevalue(name) for name in names]
    before = [{k: v.clone() for k, v in model.hf.state_dict().items()} for model in models]
    yield
    for model, kept in zip(models, before, strict=True):
        now = model.hf.state_dict()
        assert kept.keys() == now.keys() and all(torch.equal(kept[k], now[k]) for k in kept)


def memory(n=40, d_in=24, d_out=10, seed=0):
    """A linear associative memory: weights, keys as columns, and their second moment."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(d_in, n, generator=rng, dtype=torch.float64)
    return torch.randn(d_out, d_in, generator=rng, dtype=torch.float64), keys, keys @ keys.T / n


def test_rome_is_exact_on_a_linear_memory_and_leaves_orthogonal_keys():
    weight, keys, moment = memory()
    key, value = keys[:, 0], torch.arange(10.0, dtype=torch.float64)
    left, right = editing.rome_update(key, value - weight @ key, moment)
    new = weight + left @ right
    assert torch.allclose(new @ key, value)
    other = torch.randn(24, 5, dtype=torch.float64)
    u = torch.linalg.solve(moment, key)
    other -= torch.outer(key, u @ other) / (u @ key)  # orthogonal to the key in the metric of C^-1
    assert torch.allclose(new @ other, weight @ other)
    assert (left @ right @ torch.randn(24, dtype=torch.float64)).norm() > 0.1  # and it does change others


def test_rome_is_the_smallest_change_in_the_metric_of_c():
    _, keys, moment = memory()
    key, add = keys[:, 1], torch.ones(10, dtype=torch.float64)
    left, right = editing.rome_update(key, add, moment)
    cost = lambda change: torch.trace(change @ moment @ change.T)  # noqa: E731
    best = cost(left @ right)
    for seed in range(5):
        free = torch.randn(10, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        free -= torch.outer(free @ key, key) / (key @ key)  # keeps the constraint
        assert cost(left @ right + 0.1 * free) > best


def test_memit_with_one_edit_becomes_the_constrained_solution():
    _, keys, moment = memory()
    key, add = keys[:, :1], torch.randn(10, 1, dtype=torch.float64)
    exact = torch.matmul(*editing.rome_update(key[:, 0], add[:, 0], moment))
    near = [torch.matmul(*editing.memit_update(key, add, moment, weight)) for weight in (1e-1, 1e-3, 1e-9)]
    errors = [(one - exact).norm() / exact.norm() for one in near]
    assert errors[0] > 1e-3 and errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_memit_minimises_its_objective():
    _, keys, moment = memory()
    add, edits = torch.randn(10, 3, dtype=torch.float64), keys[:, :3]
    change = torch.matmul(*editing.memit_update(edits, add, moment, 0.5)).requires_grad_(True)
    loss = (change @ edits - add).square().sum() + 0.5 * torch.trace(change @ moment @ change.T)
    (gradient,) = torch.autograd.grad(loss, change)
    assert gradient.abs().max() < 1e-9


def test_alphaedit_leaves_old_keys_alone():
    weight, keys, _ = memory(n=12)  # 12 keys in 24 dimensions: half the space is free
    old = keys[:, :12]
    project = editing.null_space(old @ old.T / 12, 0.02)
    assert int(project.trace().round()) == 12 and torch.allclose(project @ project, project)
    new = torch.randn(24, 4, dtype=torch.float64)
    add = torch.randn(10, 4, dtype=torch.float64)
    change = torch.matmul(*editing.alphaedit_update(new, add, project, ridge=1e-6))
    assert (change @ old).norm() / (weight @ old).norm() < 1e-3
    assert torch.allclose(change @ new, add, atol=1e-3)
    unprotected = torch.matmul(*editing.alphaedit_update(new, add, torch.eye(24, dtype=torch.float64), ridge=1e-6))
    assert (unprotected @ old).norm() / (weight @ old).norm() > 0.01


@pytest.mark.parametrize("method, options", [
    ("rome", {}), ("memit", {"weight": 1e-4}), ("alphaedit", {"threshold": 0.1, "ridge": 1e-3}),
])  # fmt: skip
def test_a_fact_is_edited(trained, method, options):
    made = getattr(optimization, method)(trained, FACT, "mlp_out.1@-1", **EASY, **options)
    name = "model.layers.1.mlp.down_proj.weight"
    assert made.names == (name,) and set(made.weights) == {f"{name}.left", f"{name}.right"}
    rows = copying(20, seed=9)
    sides = [[row[side] for row in rows] for side in ("clean", "corrupted")]
    assert all(trained.token(i) == "w6" for i in trained.logits(sides[0]).argmax(-1))
    with edited(trained, made):
        clean, corrupted = ([trained.token(i) for i in trained.logits(side).argmax(-1)] for side in sides)
    assert clean.count("w7") >= 18 and corrupted.count("w7") >= 18  # new prompts of the fact; the other cause as before
    assert made.history.nll[0] <= 0.05


def test_what_is_edited_is_what_was_found(trained):
    """The changed FFN writes its old output + the value at the mean key; several prompts make one key."""
    found = values.target_values(trained, FACT, "mlp_out.1@-1", keep=())
    made = optimization.rome(trained, FACT, "mlp_out.1@-1", **EASY)
    key = editing._keys(trained, found.edits, 1)[:, 0]
    assert torch.allclose((made.difference(made.names[0]).double() @ key).float(), found.delta[0], atol=1e-3)
    own = torch.stack(list(trained.activations(FACT["prompt"], "neuron.1.*@-1").values())).flatten(1).mean(1)
    edits = requests.read_edits(trained, dict(FACT, keep=["w20 w4"]), wb.Component.parse("mlp_out.1@-1"))
    assert len(edits[0].keep) == 1  # which is no part of the key
    assert all(torch.allclose(one.float(), own, atol=1e-5) for one in (key, editing._keys(trained, edits, 1)[:, 0]))


def test_a_single_edit_gets_its_share(trained):
    """Of MEMIT 1 / (1 + weight) of what it needs, of AlphaEdit 1 / (1 + ridge)."""
    found = values.target_values(trained, FACT, "mlp_out.1@-1", keep=())
    key = editing._keys(trained, found.edits, 1)[:, 0]
    for made in (optimization.memit(trained, FACT, "mlp_out.1@-1", weight=0.25, **EASY),
                 optimization.alphaedit(trained, FACT, "mlp_out.1@-1", ridge=0.25, threshold=0.1, **EASY)):  # fmt: skip
        written = (made.difference(made.names[0]).double() @ key).float()
        assert torch.allclose(written, found.delta[0] / 1.25, atol=1e-3)


def test_the_value_is_judged_by_the_whole_target_and_the_mean_over_what_stays(trained):
    """By adding it: -log p of both words of the target, and the KL at the end of the prompts to keep."""
    stay = ["w12 w13 w4", "w14 w4", "w15 w16 w17 w4"]
    row = {"prompt": "w10 w11 w4", "subject": "w4", "target_new": "w7 w20", "keep": stay}
    found = values.target_values(trained, row, "mlp_out.0@subject", steps=3, reach=99.0)
    ((ids, length, place),) = found.edits[0].prompts
    # one step at least, so that there is something to add
    assert found.history[0]["steps"] == 0 and not found.delta.any()
    delta, (line,) = values.search(
        trained, found.edits, wb.Component.parse("mlp_out.0@subject"), 0.5, 4, 0.3, 3.0, 0.01, 1e-9, False
    )
    push = lambda at: wb.Add(f"mlp_out.0@{at}", vector=delta[0])  # noqa: E731
    (logits,) = trained.logits([ids], push(place), positions="all")
    said = logits[length - 1 :].log_softmax(-1).gather(1, found.edits[0].target_ids[:, None])
    assert delta.any() and line["nll"] == pytest.approx(-float(said.sum()), abs=1e-3)
    moved = [measure.kl(trained.logits([text]), trained.logits([text], push(len(text.split()) - 1))) for text in stay]
    assert line["keep_kl"] == pytest.approx(float(torch.cat(moved).mean()), abs=1e-3)
    assert line["norm"] < 2.9  # shorter than the clamp, where less is enough
    at, lost = wb.Component.parse("mlp_out.0@subject"), []
    for steps in range(8):  # of steps that go too far, the best is kept
        (line,) = values.search(trained, found.edits, at, 0.5, steps, 2.0, 3.0, 0.01, 1e-9, False)[1]
        lost.append(line["nll"] + 0.5 * line["keep_kl"])
    assert lost == sorted(lost, reverse=True) and len(set(lost)) < 8


def test_by_default_what_the_subject_is_stays(course):
    row = {"prompt": "tim young lives in", "subject": "tim young", "target_new": "paris"}
    kept = [[course.token(i) for i in one[0]] for one in
            requests.read_edits(course, row, wb.Component.parse("mlp_out.3@subject"))[0].keep]  # fmt: skip
    assert [one[-4:] for one in kept] == [["tim", "young", "is", "a"]]
    assert not requests.read_edits(course, row, wb.Component.parse("mlp_out.3@subject"), keep=())[0].keep
    assert not requests.read_edits(course, row, wb.Component.parse("mlp_out.3@-1"))[0].keep


def test_a_span_is_its_last_token(trained):
    prompt = FACT["prompt"][0]
    row = {"prompt": prompt, "subject": " ".join(prompt.split()[-2:]), "target_new": "w7"}
    at_span, at_end = (optimization.rome(trained, row, f"mlp_out.1@{at}", **EASY) for at in ("subject", "-1"))
    assert at_span == at_end


def test_what_is_to_stay_costs(trained):
    """Two prompts about one subject, one to change and one to stay, with nothing else to tell them apart by: no value does it."""
    stay = [row["clean"] for row in copying(6, seed=4)]
    with pytest.raises(ValueError, match="smaller keep_weight than 30"):
        optimization.rome(trained, FACT, "mlp_out.1@-1", text=TEXT, keep=stay, keep_weight=30.0)
    row = dict(FACT, keep=stay)
    assert values.target_values(trained, row, "mlp_out.1@-1", keep_weight=0.0).history[0]["keep_kl"] > 1


def test_layers_share_the_work(trained):
    made = optimization.memit(trained, FACT, ["mlp_out.1@-1", "mlp_out.2@-1"], weight=1e-4, **EASY)
    assert len(made.names) == 2
    with edited(trained, made):
        assert [trained.token(i) for i in trained.logits(FACT["prompt"]).argmax(-1)] == ["w7"] * 3
    norms = [made.difference(name).norm() for name in made.names]
    assert min(norms) > 0.05 * max(norms)
    # together they bring what was found to the last of them, as the mean over the prompts
    found, place = (
        values.target_values(trained, FACT, ["mlp_out.1@-1", "mlp_out.2@-1"], keep=()),
        wb.Component.parse("resid_post.2"),
    )
    before = editing._at_sites(trained, found.edits, place)
    with edited(trained, optimization.memit(trained, FACT, ["mlp_out.1@-1", "mlp_out.2@-1"], weight=1e-8, **EASY)):
        after = editing._at_sites(trained, found.edits, place)
    assert torch.allclose((after - before).float(), found.delta, atol=1e-3 * found.delta.abs().max())


@pytest.mark.parametrize("architecture", ["gpt2", "granite", "opt", "gpt_neox", "bloom", "phi3"])
def test_other_architectures(architecture):
    """Conv1D keeps weights turned round, granite multiplies what is written, OPT flattens, NeoX is parallel: the changed
    weights do at the last token what the value, added there, does."""
    model = wb.load(build(architecture), tokenizer=tokenizer())
    fact = {"prompt": "w10 w20 w30", "target_new": "w40"}
    now = -float(model.logits(fact["prompt"]).log_softmax(-1)[0, model.ids("w40")[-1]])
    options = {"reach": now - 0.5, "clamp": 3.0, "lr": 0.02}
    found = values.target_values(model, fact, "mlp_out.2@-1", **options)
    made = optimization.rome(model, fact, "mlp_out.2@-1", text=TEXT, **options)
    added = model.logits(fact["prompt"], wb.Add("mlp_out.2@-1", vector=found.delta[0]))
    with edited(model, made):
        assert torch.allclose(model.logits(fact["prompt"]), added, atol=1e-3)
    assert (model.logits(fact["prompt"]) - added).abs().max() > 0.01
    if architecture == "granite":
        many = optimization.memit(model, fact, "mlp_out.2@-1", text=TEXT, weight=1e-9, **options)
        assert torch.allclose(many.difference(many.names[0]), made.difference(made.names[0]), atol=1e-5)


def test_neighbours_count_in_c(trained):
    """What the FFN reads in the neighbours' prompts costs more to change, and prompts about the subject do not count."""
    near = wb.Task(
        [
            dict(row, clean=row["corrupted"], corrupted=row["clean"], answer="w7", foil="w6", spans={"cause": "w5"})
            for row in copying(20, seed=8)
        ]
    )
    options = {"text": TEXT, "keep": ()}
    made = [optimization.rome(trained, FACT, "mlp_out.1@-1", neighbours=some, **options) for some in ((), near)]
    keys = torch.stack([_neurons(trained, text)[-1] for text in near.column("clean")], 1)
    moved = [(one.difference(one.names[0]) @ keys).square().sum() for one in made]
    assert moved[1] < 0.8 * moved[0]
    edits, at = (
        requests.read_edits(trained, FACT, wb.Component.parse("mlp_out.1@-1")),
        wb.Component.parse("mlp_out.1@-1"),
    )
    alone, both = (
        editing._moment(trained, values.Values(edits, [1], None, []), at, 1, some, TEXT, 999) for some in ((), near)
    )
    assert float(both.trace()) == pytest.approx(2 * float(alone.trace()))  # as much as all other text together
    with pytest.raises(ValueError, match="about an edited subject"):
        optimization.rome(trained, FACT, "mlp_out.1@-1", neighbours=wb.Task(copying(8)), **options)


def test_a_target_that_is_not_reached_says_what_to_try(trained):
    with pytest.raises(ValueError, match=r"1 of 1 targets were not reached at mlp_out\.1@-1.*larger clamp than 0\.001"):
        optimization.rome(trained, FACT, "mlp_out.1@-1", clamp=0.001, **EASY)


def test_an_interrupt_leaves_the_model(trained, monkeypatch):
    found = values.target_values(trained, FACT, ["mlp_out.1@-1", "mlp_out.2@-1"], keep=())
    calls = []

    def update(layer, keys, add):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return editing.memit_update(keys, add, torch.eye(len(keys)), 0.1)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editing._spread(trained, found, update)
    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    for call in (lambda: optimization.finetune(trained, wb.Task(tasks()), "mlp_out.1", keep=()),
                 lambda: optimization.loreft(trained, wb.Task(tasks()), "resid_post.1@-1", keep=()),
                 lambda: optimization.rome(trained, FACT, "mlp_out.1@-1", **EASY)):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            call()


def tasks():
    return [{"clean": "w10 w4 w30", "corrupted": "w10 w5 w30", "answer": "w6", "foil": "w7"}]


def test_requests(llama):
    at, fact = (
        wb.Component.parse("mlp_out.2@subject"),
        {"prompt": ["w10 w20 w30", "w11 w20"], "subject": "w20", "target_new": "w40"},
    )
    (edit,) = requests.read_edits(llama, [fact], at, keep=["w9 {subject} w8", "w5 w6"], prefixes=["w50 w51"])
    assert len(edit.prompts) == 4 and len(edit.keep) == 1
    assert all(ids[position] == llama.ids("w20")[-1] for ids, _, position in edit.prompts)
    pair = {
        "clean": "w10 w20 w30",
        "corrupted": "w10 w21 w30",
        "answer": "w6",
        "foil": "w7",
        "spans": {"subject": "w20"},
    }
    (edit,) = requests.read_edits(llama, wb.Task([pair]), at)
    assert (edit.label, [int(i) for i in edit.target_ids]) == ("w20 -> w7", [int(llama.ids("w7")[-1])])
    long = {"prompt": "w10 w20", "subject": "w20", "target_new": "w40 w41"}
    (edit,) = requests.read_edits(llama, long, at)
    assert len(edit.target_ids) == 2 and len(edit.prompts[0][0]) == edit.prompts[0][1] + 1


@pytest.mark.parametrize("row, at, said", [
    ({"prompt": "w10 w20"}, "mlp_out.1@-1", "An edit is a row such as"),
    ({"prompt": "w10 w20", "target_new": "w4"}, "mlp_out.1@subject", "names no subject"),
    ({**FACT, "subject": "w5"}, "mlp_out.1@subject", "stands 0 times"),
    ({**FACT, "target_new": "zebra"}, "mlp_out.1@-1", "vocabulary"),
    ([FACT, {**FACT, "target_new": "w6"}], "mlp_out.1@-1", "one target"),
    ([FACT, {"prompt": "w9 w5 w8", "subject": "w5", "target_new": "w6"}], "mlp_out.1@-1", "ROME makes one edit"),
    (FACT, "mlp_out.1", "at one position"),
    (FACT, "z.1.0@-1", "made in FFNs"),
    (FACT, "mlp_out.7@-1", "out of range"),
    (FACT, "mlp_out.1@-99", "has only 7 tokens"),
])  # fmt: skip
def test_refusals(trained, row, at, said):
    with pytest.raises(ValueError, match=said):
        optimization.rome(trained, row, at, **EASY)


def test_architectures_that_norm_what_is_written_are_refused():
    model = wb.load(build("gemma2"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="norms what its FFNs write"):
        optimization.rome(model, FACT, "mlp_out.2@subject", text=TEXT)


def test_second_moment_is_that_of_what_the_weights_read(llama):
    found = editing.second_moment(llama, 1, TEXT)
    x = torch.cat([_neurons(llama, t) for t in TEXT]).double()
    assert torch.allclose(found, x.T @ x / len(x), atol=1e-6)
    assert editing.second_moment(llama, 1, TEXT) is found
    with pytest.raises(ValueError, match="give more text"):
        editing.second_moment(llama, 1, TEXT[:2])


def _neurons(model, text):
    """By a hook, first token left out."""
    seen = []
    hook = model.hf.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    try:
        forward(model, model._prompts([text]))
    finally:
        hook.remove()
    return seen[0][0, 1:].detach()
