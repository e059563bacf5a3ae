"""Running with interventions: identities, padding, phases, generation, refusals that change nothing."""

import sys
from operator import attrgetter

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.task import DATA


def edits(model):
    torch.manual_seed(0)
    width = model.names.d_model
    found = [wb.Zero("z.1.2"), wb.ProjectOut("resid_post.1", torch.randn(width)), wb.Scale("attn_out.1", 0.5),
             wb.Add("resid_post.0@-1", torch.randn(width))]  # fmt: skip
    return found + ([] if "resid_mid" in model.names.refused else [wb.Scale("resid_mid.1", 1.5)])


def test_no_intervention_is_the_plain_model(tiny, words):
    for prompt in words(3, 8):
        plain = tiny.hf(tiny.ids(prompt)[None]).logits
        assert torch.allclose(tiny.logits(prompt), plain[:, -1], atol=1e-5)
        assert torch.allclose(tiny.logits(prompt, positions="all")[0], plain[0], atol=1e-5)


def test_zero_strength_changes_no_bit(tiny, words):
    prompts, vector = words(3, 8), torch.ones(tiny.names.d_model)
    plain = tiny.logits(prompts)
    for nothing in (0 * wb.Add("resid_post.1", vector), wb.Scale("z.0.0", 1), wb.Zero("z.0.0", phase="generation")):
        assert torch.equal(tiny.logits(prompts, nothing), plain)


def test_padded_batches_give_the_numbers_of_one_prompt_at_a_time(tiny, words):
    prompts, change = words(3, 9, 1, 6), edits(tiny)
    one = torch.cat([tiny.logits(prompt, *change) for prompt in prompts])
    many = tiny.logits(prompts, *change)
    assert (one - tiny.logits(prompts)).abs().max() > 0.01, "the interventions should matter"
    assert (one - many).abs().max() <= 1e-5 * one.abs().max()
    single = [tiny.generate(prompt, *change, max_new_tokens=6) for prompt in prompts]
    assert tiny.generate(prompts, *change, max_new_tokens=6) == single
    assert tiny.generate(prompts, *change, max_new_tokens=6, use_cache=False) == single


def test_replacing_everything_by_itself_changes_nothing(tiny, words):
    prompt = words(6)[0]
    own = tiny.activations(prompt, "resid_post.1")[0]
    same = [wb.Replace(f"resid_post.1@{i}", own[i]) for i in range(len(own))]
    assert torch.equal(tiny.logits(prompt, *same), tiny.logits(prompt))


def test_what_is_written_is_what_is_read(tiny, words):
    width = {"z.1.2": tiny.names.d_head}
    for where in ["resid_pre.1", "z.1.2", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1"]:
        if where.split(".")[0] in tiny.names.refused:
            continue
        value = torch.randn(width.get(where, tiny.names.d_model))
        seen = tiny.activations(words(5), where, wb.Replace(f"{where}@2", value))
        plain = tiny.activations(words(5), where)
        assert torch.allclose(seen[0, 2], value, atol=1e-4)
        assert torch.equal(seen[0, [0, 1, 3, 4]], plain[0, [0, 1, 3, 4]])


def test_many_components_change_at_once_as_one_by_one(llama, words, monkeypatch):
    """One call for each tensor and set of columns, and the same bits; a component named twice is changed twice."""
    neurons = [f"neuron.{layer}.{i}" for layer in (0, 1) for i in torch.randperm(llama.names.d_mlp)[:20].tolist()]
    values = torch.randn(len(neurons))
    prompts, calls, real = words(3, 6), [], wb.Replace.changes

    def counted(one, x, which):
        calls.append(len(which))
        return real(one, x, which)

    for place in ("", "@-1"):
        at = [one + place for one in neurons]
        many = wb.Replace(at, values)
        apart = [wb.Replace(one, values[i : i + 1]) for i, one in enumerate(at)]
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(wb.Replace, "changes", counted)
            changed = llama.logits(prompts, many)
        assert calls == [20, 20]
        assert torch.equal(changed, llama.logits(prompts, *apart)) and not torch.equal(changed, llama.logits(prompts))
    twice = wb.Scale(["z.1.1", "z.1.*", "z.1.1"], 0.5)
    assert torch.allclose(llama.activations(words(4), "z.1.1", twice), llama.activations(words(4), "z.1.1") / 8)
    assert torch.allclose(llama.activations(words(4), "z.1.0", twice), llama.activations(words(4), "z.1.0") / 2)


def test_two_interventions_on_one_tensor_follow_each_other(llama, words):
    vector = torch.ones(32)
    plain = llama.activations(words(4), "resid_post.0")
    for first, second in (("resid_post.0", "resid_pre.1"), ("resid_pre.1", "resid_post.0")):  # one tensor, two names
        for order, expected in ((1, (plain + vector) * 2), (-1, plain * 2 + vector)):
            both = [wb.Add(first, vector), wb.Scale(second, 2.0)][::order]
            for where in (first, second):
                assert torch.allclose(llama.activations(words(4), where, wb.Recipe(both)), expected, atol=1e-5)


def test_what_attention_writes_is_changed_before_the_stream_it_is_part_of(llama, words):
    vector, plain = torch.ones(32), llama.activations(words(4), "resid_mid.1")
    both = [wb.Scale("resid_mid.1", 2.0), wb.Add("attn_out.1", vector)]  # one tensor holds both
    for order in (both, both[::-1]):
        assert torch.allclose(llama.activations(words(4), "resid_mid.1", *order), 2 * (plain + vector), atol=1e-4)


def test_several_passes_give_what_one_gives(llama, words, monkeypatch):
    """Each prompt keeps its own span (whose tokens are averaged), its own generated part and its own number."""
    plan, spans = wb.model.Prompts, [{"here": [i % 3, i % 3 + 1]} for i in range(5)]
    prompts = plan([llama.ids(text) for text in words(6, 8, 5, 7, 6)], [4, 6, 5, 5, 4], spans)
    change = [wb.Add("resid_post.0@here", torch.ones(32)), wb.Scale("mlp_out.1", 3.0, phase="generation")]
    target, chunks = torch.arange(10, 15), plan.chunks

    def metric(logits, rows):
        return logits.gather(-1, target[rows, None])[:, 0]

    def run():
        value, acts, slopes = llama.gradients(prompts, "resid_post.0@here", metric, *change)
        return (
            value,
            *acts.values(),
            *slopes.values(),
            llama.logits(prompts, *change),
            *llama.logits(prompts, *change, positions="all"),
        )

    whole = run()
    assert torch.allclose(whole[0], metric(whole[3], torch.arange(5)), atol=1e-5)
    for i, row in enumerate(spans):
        alone = llama.activations(prompts.ids[i][None], "resid_post.0")[0, row["here"]].mean(0) + 1
        assert torch.allclose(whole[1][i], alone, atol=1e-5)
    monkeypatch.setattr(plan, "chunks", lambda prompts, budget=None: chunks(prompts, 16))
    for one, other in zip(whole, run(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"do_sample": True, "temperature": 0.7}], ids=str)
def test_phases_touch_the_right_tokens(tiny, words, settings):
    """Read the residuals of a whole generation: which tokens were changed, prompt or generated?"""
    prompts, steps = words(3, 5), 4
    where, following = "resid_post.1", attrgetter(tiny.names.row.layers)(tiny.hf)[2]
    for phase in ("prompt", "generation", "both"):
        change, seen = wb.Add(where, torch.full((tiny.names.d_model,), 3.0), phase=phase), []
        reading = following.register_forward_pre_hook(
            lambda _, args, rest, seen=seen: seen.append((args[0] if args else rest["hidden_states"]).clone()),
            with_kwargs=True,
        )
        try:
            new = tiny.generate_ids(prompts, change, max_new_tokens=steps, min_new_tokens=steps, **settings)
        finally:
            reading.remove()
        width = max(len(tiny.ids(prompt)) for prompt in prompts)
        assert [x.shape[1] for x in seen] == [
            width + i if "use_cache" in settings or not i else 1 for i in range(steps)
        ]
        seen = (
            seen[-1] if "use_cache" in settings else torch.cat(seen, 1)
        )  # all tokens but the last, which is not read again
        for row, (prompt, made) in enumerate(zip(prompts, new)):
            ids = torch.cat([tiny.ids(prompt), made])
            length = len(ids) - len(made)
            replay = wb.model.plan.Prompts([ids], [length])
            now, plain = tiny.activations(replay, where, change)[0], tiny.activations(replay, where)[0]
            # a change at resid_post.1 shows at its own tokens only, so `touched` is where it acted
            touched = ((now - plain).abs().amax(-1) > 1).tolist()
            assert touched == [phase != "generation"] * length + [phase != "prompt"] * len(made)
            # and these are the residuals that the text was made from, in its padded batch
            generating = seen[row, width - length :]
            assert (generating - now[:-1]).abs().max() < 1e-4 * now.abs().max()
            if not settings.get("do_sample"):
                logits = tiny.logits(replay, change, positions="all")[0]
                logits[:, tiny.tokenizer.eos_token_id] = float("-inf")  # min_new_tokens forbids the end
                assert logits.argmax(-1)[length - 1 : -1].tolist() == made.tolist()


def test_generation_stops_at_the_end_and_leaves_the_model_usable(llama, words):
    prompt = words(5)[0]
    first = llama.generate_ids(prompt, max_new_tokens=4)[0]
    short = llama.generate_ids(prompt, max_new_tokens=10, eos_token_id=int(first[1]))[0]
    assert short.tolist() == first.tolist()[:1]
    assert torch.equal(llama.generate_ids(prompt, max_new_tokens=4)[0], first)


def test_what_ended_early_in_a_batch_ends_there_also_where_padding_is_the_end_of_sequence(llama, words):
    tok = tokenizer()
    tok.pad_token = tok.eos_token
    model, prompts = wb.load(llama.hf, tokenizer=tok), words(5, 6)
    first, other = (one.tolist() for one in model.generate_ids(prompts, max_new_tokens=6))
    end = next(token for token in first if token not in other)
    made = model.generate_ids(prompts, max_new_tokens=6, eos_token_id=end)
    assert [one.tolist() for one in made] == [first[: first.index(end)], other]


def test_sampling_is_seeded(llama, words):
    settings, state = {"do_sample": True, "max_new_tokens": 8}, torch.get_rng_state()
    one = llama.generate(words(4), seed=1, **settings)
    assert one == llama.generate(words(4), seed=1, **settings)
    assert one != llama.generate(words(4), seed=2, **settings)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the generator of others


@pytest.mark.parametrize("change, said", [
    (lambda: wb.Zero("z.9.0"), "layer 9 is out of range"), (lambda: wb.Zero("z.0.9"), "head 9 is out of range"),
    (lambda: wb.Zero("z.0.1@7"), "position 7 is out of range; prompt 0 has 4 tokens"),
    (lambda: wb.Zero("z.0.1@subject"), "no span 'subject'"),
    (lambda: wb.Add("resid_post.0", torch.ones(3)), "32 numbers wide"),
])  # fmt: skip
def test_bad_interventions_change_nothing(llama, words, change, said):
    before = llama.logits(words(4))
    with pytest.raises(ValueError, match=said):
        llama.logits(words(4), change())
    assert torch.equal(llama.logits(words(4)), before)


def test_bad_prompts_get_a_sentence(llama):
    with pytest.raises(ValueError, match="'hello'"):
        llama.logits("w5 hello w6")
    with pytest.raises(ValueError, match="empty"):
        llama.logits("")
    with pytest.raises(TypeError, match="text or a list of texts"):
        llama.logits(5)
    with pytest.raises(ValueError, match="differ in length"):
        llama.activations(["w5", "w5 w6"], "resid_post.0")
    with pytest.raises(ValueError, match="'last' or 'all'"):
        llama.logits("w5", positions="first")
    with pytest.raises(ValueError, match="one text per prompt"):
        llama.generate("w5", num_beams=2)
    with pytest.raises(TypeError, match="A prompt is a string"):
        llama.ids(5)


def test_beginning_of_sequence_is_explicit(words):
    hf, tok = build("llama"), tokenizer()
    without, with_bos = wb.load(hf, tokenizer=tok), wb.load(hf, tokenizer=tok, bos=True)
    assert not without.bos and with_bos.tokens("w5 w6") == ["<bos>", "w5", "w6"]
    assert not torch.equal(without.logits("w5 w6"), with_bos.logits("w5 w6"))
    assert torch.equal(with_bos.logits("w5 w6"), without.logits([torch.tensor([1, 5, 6])]))


def test_chat_needs_a_template(llama):
    with pytest.raises(ValueError, match="no chat template"):
        llama.chat("hello")


def test_loading_by_a_wrong_name_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"No model 'cours'.*Did you mean 'course'"):
        wb.load("cours")
    with pytest.raises(ValueError, match=r"no such folder\. Did you mean .*course'"):
        wb.load(f"{DATA}/cours")
    with pytest.raises(ValueError, match="could be loaded"):
        wb.load("somebody/something")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        wb.load(build("llama"))


def test_checkpoints_along_training_are_listed_and_loaded(course, tmp_path):
    """Rows of int8 with an fp16 scale lose at most half a step of the row's largest weight."""
    sys.path.insert(0, str(DATA))
    from train_course import save_checkpoint

    course.hf.save_pretrained(tmp_path)
    course.tokenizer.save_pretrained(tmp_path)
    for step in ("step1000", "step90"):
        save_checkpoint(course.hf, tmp_path / "checkpoints" / f"{step}.safetensors")
    assert wb.revisions(tmp_path) == ["step90", "step1000"]
    again = wb.load(tmp_path, revision="step90")
    for name, weight in again.hf.state_dict().items():
        exact = course.hf.state_dict()[name]
        step = exact.abs().amax(-1, keepdim=True) / 127 if exact.dim() == 2 else exact.abs() / 1000
        assert ((weight - exact).abs() <= 0.51 * step + 1e-6).all(), name
    prompt = "the capital of kenya is"
    assert again.generate(prompt, max_new_tokens=1) == course.generate(prompt, max_new_tokens=1)
    assert again.fingerprint != course.fingerprint
    with pytest.raises(ValueError, match=r"has no revision 'step7'. It has: step90, step1000\."):
        wb.load(tmp_path, revision="step7")


def test_fingerprints_tell_models_apart():
    one, same, other = (wb.load(build("llama", seed), tokenizer=tokenizer()) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_half_precision_offers_the_same_parts(words):
    model = wb.load(build("llama").to(torch.bfloat16), tokenizer=tokenizer())
    assert "attn_out" not in model.names.refused and "resid_mid" not in model.names.refused
    assert model.fingerprint == wb.load(build("llama"), tokenizer=tokenizer()).fingerprint
    assert torch.isfinite(model.logits(words(5), *edits(model))).all()


def test_the_bundled_model_speaks_its_chat_template(course):
    assert course.chat("where is oslo ?") == "user : where is oslo ? assistant :"
    assert (
        course.chat("where is oslo ?", "be cheerful .") == "system : be cheerful . user : where is oslo ? assistant :"
    )
    assert "oslo" in course.generate(course.chat("where is oslo ?"))


def test_the_bundled_model_is_found_and_offline(course):
    assert (DATA / "course" / "model.safetensors").is_file()
    assert course.bos and "M parameters" in repr(course)
