"""Addresses round-trip, sort in forward order, and say what is wrong with a bad one."""

import pytest

from workbench.component import KINDS, Component, components


@pytest.mark.parametrize("text", ["embed", "logits", "resid_post.5", "z.4.2", "z.9.6@-1", "resid_post.3@4",
                                  "resid_post.3@subject", "neuron.5.120", "z.*.*", "neuron.5.*", "feature.sae.77@-1"])  # fmt: skip
def test_parse_and_str_round_trip(text):
    assert str(Component.parse(text)) == text
    assert Component.parse(Component.parse(text)) == Component.parse(text)


def test_a_kind_alone_is_its_family():
    assert str(Component.parse("z")) == "z.*.*"
    assert str(Component.parse("resid_pre@-1")) == "resid_pre.*@-1"


@pytest.mark.parametrize("alias, meant", [("blocks.5.hook_resid_post", "resid_post.5"), ("L9H6", "z.9.6"),
                                          ("blocks.2.attn.hook_z", "z.2.*"), ("L9H6@-1", "z.9.6@-1"),
                                          ("blocks.1.mlp.hook_post", "neuron.1.*"), ("hook_embed", "embed")])  # fmt: skip
def test_transformer_lens_names(alias, meant):
    assert Component.parse(alias) == Component.parse(meant)


def test_one_tensor_has_one_canonical_address():
    assert Component.parse("resid_pre.5@2").canonical == Component.parse("resid_post.4@2")
    assert Component.parse("resid_pre.0").canonical == Component.parse("resid_pre.0")


def test_sorting_is_forward_order():
    forward = ["embed", "resid_pre.0", "z.0.1", "z.0.3", "attn_out.0", "resid_mid.0", "neuron.0.7", "mlp_out.0",
               "resid_post.0@-1", "resid_pre.1", "ln_final", "logits"]  # fmt: skip
    assert [str(one) for one in sorted(map(Component.parse, reversed(forward)))] == forward


@pytest.mark.parametrize("text, said", [("resid_pst.3", "Did you mean 'resid_post.3'"), ("z.a.1", "'a' is no number"),
                                        ("resid_post.1.2", "too many numbers"), ("z.1.2@", "after @"),
                                        ("zzz", "Kinds are"), ("feature.7", "feature.NAME.77")])  # fmt: skip
def test_bad_addresses_get_a_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        Component.parse(text)


def test_components_takes_one_or_many():
    assert components("z.0.1") == (Component("z", 0, 1),)
    assert components(["z.0.1", Component("z", 0, 2)]) == (Component("z", 0, 1), Component("z", 0, 2))
    with pytest.raises(ValueError, match="No component"):
        components([])


def test_every_kind_parses():
    for kind in KINDS:
        assert Component.parse("feature.x.1" if kind == "feature" else kind).kind == kind
