"""The contract of every backbone that is found, and of the stub for a new pipeline class."""

import importlib.util
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from support import tiny_pipelines
from support.checkpoints import (
    EMBEDDED,
    PROMPTS,
    STEPS,
    Checkpoint,
    embedded,
    noise_for,
    our_images,
    their_images,
)
from torch import Tensor, nn

from tafs.common import seeding
from tafs.models import Conditioning, base, catalog, loading, sampling, template
from tafs.shapes import text

FOUND = {
    f"{name}-{pipeline}": (pipeline, backbone)
    for name, plugin in catalog.plugins().items()
    for pipeline, backbone in plugin.backbones.items()
}
# A plug-in for SANA would be tested in the stub's place.
STUB = () if "SanaPipeline" in catalog.backbones() else ("stub",)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cache
def checkpoint_of(name: str) -> Checkpoint:
    """A tiny random checkpoint for a backbone, the stub's for SANA, or an embedded model."""
    folder = Path(mkdtemp())
    if name in EMBEDDED:
        return embedded(name)
    if name == "stub":
        file = template.write("my-sana", "SanaPipeline", folder)
        spec = importlib.util.spec_from_file_location("my_sana", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        [(pipeline, backbone)] = module.PLUGIN.backbones.items()
    else:
        pipeline, backbone = FOUND[name]
    if pipeline not in tiny_pipelines.PIPELINES:
        pytest.fail(
            f"{pipeline}: add a function that writes a tiny random checkpoint to PIPELINES in "
            "tests/support/tiny_pipelines.py"
        )
    return Checkpoint(backbone, tiny_pipelines.PIPELINES[pipeline](folder / "checkpoint"))


@pytest.fixture(params=[*FOUND, *STUB])
def checkpoint(request) -> Checkpoint:
    return checkpoint_of(request.param)


@pytest.fixture(params=[*FOUND, *STUB, *EMBEDDED])
def any_checkpoint(request) -> Checkpoint:
    return checkpoint_of(request.param)


def test_shapes_and_types_are_those_of_the_interface(any_checkpoint):
    backbone = any_checkpoint.load()
    cond, x_t = backbone.encode(PROMPTS), noise_for(backbone)
    assert len(cond.embeds) == len(cond.pooled) == len(PROMPTS)
    with torch.no_grad():
        v = backbone.velocity(x_t, torch.tensor([1.0, 0.3]), cond)
        images = backbone.decode(x_t)
    assert (v.shape, v.dtype) == (x_t.shape, torch.float32)
    assert images.shape == (len(PROMPTS), 3, backbone.resolution, backbone.resolution)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    grid = backbone.time_grid(5)
    assert len(grid) == 6 and grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("guidance", [1.0, None])
def test_images_equal_those_of_diffusers_own_pipeline(any_checkpoint, guidance):
    backbone = any_checkpoint.load(**({} if guidance is None else {"guidance": guidance}))
    ours = our_images(backbone)
    theirs = their_images(backbone, any_checkpoint.pipeline())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.01


def test_images_depend_on_the_guidance(checkpoint):
    without = checkpoint.load(guidance=1.0)
    assert without.encode(PROMPTS).negative is None
    assert (our_images(without) - our_images(checkpoint.load())).abs().max() > 1e-4


def test_a_resolution_that_splits_a_patch_is_refused(any_checkpoint):
    backbone = any_checkpoint.load()
    patch = backbone.patch_size * backbone.pipeline.vae_scale_factor
    with pytest.raises(
        ValueError, match=f"resolution: {3 * patch + 1} is not a multiple of {patch}"
    ):
        any_checkpoint.load(resolution=3 * patch + 1)


def same(a: Conditioning, b: Conditioning) -> bool:
    """Whether they are equal bit for bit."""
    pairs = [(a.embeds, b.embeds), (a.pooled, b.pooled), (a.mask, b.mask)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def test_a_prompt_has_the_same_conditioning_whichever_others_are_encoded(any_checkpoint):
    backbone = any_checkpoint.load()
    together = backbone.encode(PROMPTS)
    fresh = any_checkpoint.load()
    fresh.prepare(["a green cross", PROMPTS[1], "three rings"])
    alone = fresh.encode([PROMPTS[1]])
    assert same(alone, together[1:])
    assert not alone.embeds.requires_grad
    assert (alone.negative is None) == (backbone.negative_prompt is None)
    if alone.negative is not None:
        assert same(alone.negative, together.negative[1:])
        assert same(together.negative, backbone.encode([backbone.negative_prompt] * 2))


def test_a_repeated_prompt_is_a_repeated_row(checkpoint):
    backbone = checkpoint.load()
    cond = backbone.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert same(cond, backbone.encode(PROMPTS)[[1, 0, 1]])
    assert same(backbone.encode(PROMPTS).repeat_interleave(2)[1:3], backbone.encode(PROMPTS))


def test_a_prompt_is_encoded_once_while_the_cache_has_room(checkpoint, monkeypatch):
    backbone, calls = checkpoint.load(), []
    backbone.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    negative = backbone.negative_prompt is not None
    for _ in range(2):
        backbone.prepare(PROMPTS)
        backbone.encode([PROMPTS[0], PROMPTS[0]])
    assert len(calls) == 2 + negative
    monkeypatch.setattr(base, "KEPT_BYTES", 0)
    backbone.prepare(PROMPTS[:1])
    backbone.encode(PROMPTS[:1])
    assert len(calls) == 2 + negative
    backbone.encode(PROMPTS)
    assert len(calls) == 3 + negative


def test_the_text_encoders_are_differentiable():
    """Pretraining of the embedded models trains the CLIP text encoder."""
    backbone = checkpoint_of("shapes-sd3").load()
    weight = backbone.pipeline.text_encoder.text_projection.weight.requires_grad_()
    backbone.embed(PROMPTS).pooled.sum().backward()
    assert weight.grad.abs().max() > 0


@on_a_gpu
def test_only_network_and_autoencoder_stay_on_the_gpu(checkpoint):
    backbone = checkpoint.load(device="cuda", dtype=torch.bfloat16)
    cond = backbone.encode(PROMPTS)
    modules = {
        n: m for n, m in backbone.pipeline.components.items() if isinstance(m, torch.nn.Module)
    }
    on_cpu = {name for name, module in modules.items() if module.device.type == "cpu"}
    assert on_cpu == {name for name in modules if name.startswith("text_encoder")}
    assert cond.embeds.is_cuda and cond.pooled.is_cuda
    assert all(kept.embeds.is_pinned() for kept in backbone._kept.values())


def test_network_and_autoencoder_make_room_for_text_encoders_that_do_not_fit(
    checkpoint, monkeypatch
):
    backbone, events = checkpoint.adapted(), []
    expected = backbone.encode(PROMPTS)
    backbone._kept.clear()
    parameters = list(backbone.transformer.parameters())
    encoder = backbone.pipeline.text_encoder
    encoder.register_forward_pre_hook(lambda *_: events.append("encode"))
    for name in ("transformer", "vae"):
        module = getattr(backbone.pipeline, name)
        move = module.to

        def to(device, name=name, move=move):
            events.append((name, str(device)))
            return move(device)

        monkeypatch.setattr(module, "to", to)
    monkeypatch.setattr(base, "_fit", lambda *_: False)
    assert same(backbone.encode(PROMPTS[:1]), expected[:1])
    moves = [("transformer", "cpu"), ("vae", "cpu")]
    assert events[:3] == [*moves, "encode"] and events[-2:] == moves
    # The optimiser keeps its parameters.
    assert all(a is b for a, b in zip(parameters, backbone.transformer.parameters(), strict=True))


@pytest.mark.parametrize("fit", [True, False])
def test_other_modules_wait_only_where_text_encoders_do_not_fit_beside_everything(
    fit, checkpoint, monkeypatch
):
    class Other(nn.Linear):
        def to(self, device):
            events.append(str(device))
            return super().to(device)

    backbone, events = checkpoint.load(), []
    backbone.waiting = (Other(2, 2), Other(2, 2))
    before = [module.weight.clone() for module in backbone.waiting]
    encoder = backbone.pipeline.text_encoder
    encoder.register_forward_pre_hook(lambda *_: events.append("encode"))
    asked = []
    monkeypatch.setattr(base, "_fit", lambda modules, _: asked.append(list(modules)) or fit)
    backbone.encode(PROMPTS[:1])
    assert len(asked) == 1 and encoder in asked[0]
    encoded = [event for event in events if event == "encode"]
    assert events == (encoded if fit else ["cpu", "cpu", *encoded, "cpu", "cpu"])
    for module, weight in zip(backbone.waiting, before, strict=True):
        assert torch.equal(module.weight, weight)


@on_a_gpu
def test_the_network_waits_in_host_memory_while_text_is_encoded(checkpoint, monkeypatch):
    backbone, places = checkpoint.adapted(device="cuda"), []
    monkeypatch.setattr(base, "ROOM_BYTES", 1 << 50)
    encoder = backbone.pipeline.text_encoder
    encoder.register_forward_pre_hook(
        lambda module, _: places.append((module.device.type, backbone.device.type))
    )
    parameters = backbone.lora_parameters()
    assert backbone.encode(PROMPTS).embeds.is_cuda
    assert set(places) == {("cuda", "cpu")}
    assert backbone.device.type == backbone.pipeline.vae.device.type == "cuda"
    assert all(
        p is parameters[name] and p.is_cuda for name, p in backbone.lora_parameters().items()
    )


def gradients(backbone: base.Backbone) -> dict[str, Tensor]:
    """Gradients of the adapter, through network and decoder."""
    x_t, t = noise_for(backbone), torch.full((len(PROMPTS),), 0.6)
    v = backbone.velocity(x_t, t, backbone.encode(PROMPTS))
    backbone.decode(sampling.x0_estimate(x_t, v, t)).square().sum().backward()
    return {name: p.grad for name, p in backbone.lora_parameters().items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_a_bfloat16_network_takes_and_returns_float32(checkpoint):
    backbone, reference = (
        checkpoint.load(dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert backbone.transformer.dtype == torch.bfloat16
    assert backbone.pipeline.text_encoder.dtype == torch.bfloat16
    assert backbone.pipeline.vae.dtype == torch.float32
    x_t, t = noise_for(backbone), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        v, exact = (b.velocity(x_t, t, b.encode(PROMPTS)) for b in (backbone, reference))
    assert v.dtype == torch.float32
    assert (v - exact).norm() < 0.1 * exact.norm()


def test_the_autoencoder_has_its_own_precision(checkpoint):
    backbone, reference = checkpoint.load(vae_dtype=torch.bfloat16), checkpoint.load()
    assert backbone.transformer.dtype == torch.float32
    with torch.no_grad():
        coarse, fine = (b.decode(noise_for(b)) for b in (backbone, reference))
        mixed = reference.decode(noise_for(reference), torch.bfloat16)
    assert coarse.dtype == mixed.dtype == torch.float32
    for images in (coarse, mixed):
        assert 0 < (images - fine).abs().max() < 0.1


def test_gradients_reach_a_float32_adapter_through_a_bfloat16_network(checkpoint):
    exact, coarse = (
        gradients(checkpoint.adapted(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert {gradient.dtype for gradient in coarse.values()} == {torch.float32}
    assert torch.cosine_similarity(flat(exact), flat(coarse), dim=0) > 0.98


def test_checkpointing_recomputes_blocks_and_changes_neither_outputs_nor_gradients(checkpoint):
    """The ratio of new to old densities starts at exactly 1."""
    results = []
    for choice in (False, True):
        backbone, calls = checkpoint.adapted(gradient_checkpointing=choice), Counter()
        for block in (backbone.blocks[0], backbone.pipeline.vae.decoder):
            block.register_forward_pre_hook(lambda module, _, c=calls: c.update([type(module)]))
        our_images(backbone)
        assert calls[type(backbone.blocks[0])] == STEPS
        cond, x_t, t = backbone.encode(PROMPTS), noise_for(backbone), torch.tensor([0.9, 0.4])
        with torch.no_grad():
            sampled = backbone.velocity(x_t, t, cond)
        assert torch.equal(backbone.velocity(x_t, t, cond), sampled)
        calls.clear()
        results.append(gradients(backbone))
        assert calls[type(backbone.blocks[0])] == (2 if choice else 1)
    assert flat(results[0]).norm() > 0
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*FOUND, *EMBEDDED])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoding_with_gradients_always_recomputes_the_decoder_with_equal_gradients(
    name, checkpointing
):
    backbone = checkpoint_of(name).load(gradient_checkpointing=checkpointing)
    vae, calls = backbone.pipeline.vae, []
    for block in (vae.decoder.mid_block, *vae.decoder.up_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    blocks = 1 + len(vae.decoder.up_blocks)
    with torch.no_grad():
        backbone.decode(noise_for(backbone))
    assert len(calls) == blocks
    found = []
    for times in (2, 1):
        calls.clear()
        x_0 = noise_for(backbone).requires_grad_()
        backbone.decode(x_0).square().sum().backward()
        assert len(calls) == times * blocks
        found.append(x_0.grad)
        vae.disable_gradient_checkpointing()
    assert found[0].norm() > 0
    assert torch.equal(*found)


def test_blocks_and_the_decoder_are_compiled_on_request(checkpoint):
    for choice in (False, True):
        backbone = checkpoint.load()
        if choice:
            backbone.compile()
        modules = [*backbone.blocks, backbone.pipeline.vae.decoder]
        assert {module._compiled_call_impl is not None for module in modules} == {choice}
        assert backbone.compiled == choice


def test_only_decoding_without_gradients_is_compiled(checkpoint):
    def compiling(graph, inputs):
        compiled.append(torch.is_grad_enabled())
        return graph.forward

    backbone, compiled = checkpoint.load(), []
    backbone.compile()
    decoder = backbone.pipeline.vae.decoder
    decoder.compile(backend=compiling)
    x_0 = noise_for(backbone).requires_grad_()
    expected = backbone.decode(x_0)
    assert expected.requires_grad
    assert not compiled
    with torch.no_grad():
        torch.testing.assert_close(backbone.decode(x_0), expected.detach())
    assert set(compiled) == {False}


@pytest.mark.parametrize("name", FOUND)
def test_traced_blocks_compute_the_same_velocities_and_gradients(name):
    """One of each kind is a single graph, here without the compiler's own kernels."""
    found = []
    for traced in (False, True):
        backbone = checkpoint_of(name).adapted()
        for block in (backbone.blocks[0], backbone.blocks[-1]) if traced else ():
            block.compile(backend="aot_eager", fullgraph=True)
        x_t, t, cond = noise_for(backbone), torch.tensor([0.9, 0.4]), backbone.encode(PROMPTS)
        with torch.no_grad():
            sampled = backbone.velocity(x_t, t, cond)
        velocity = backbone.velocity(x_t, t, cond)
        velocity.square().sum().backward()
        gradients = [p.grad for p in backbone.lora_parameters().values()]
        found.append([sampled, velocity.detach(), *gradients])
    torch.testing.assert_close(*found)


@on_a_gpu
def test_compiled_blocks_compute_the_same(checkpoint):
    velocities = []
    for choice in (False, True):
        backbone = checkpoint.load(device="cuda")
        if choice:
            backbone.compile()
        x_t, t = noise_for(backbone).cuda(), torch.tensor([0.9, 0.4]).cuda()
        with torch.no_grad():
            velocities.append(backbone.velocity(x_t, t, backbone.encode(PROMPTS)))
    torch.testing.assert_close(*velocities, atol=1e-3, rtol=1e-3)


def test_a_new_adapter_changes_nothing_and_is_the_only_part_that_is_trained(checkpoint):
    plain, fresh = checkpoint.load(), checkpoint.load()
    fresh.add_lora(4, 8, seeding.generator(0, "lora"))
    torch.testing.assert_close(our_images(fresh), our_images(plain))
    trained = {n for n, p in fresh.transformer.named_parameters() if p.requires_grad}
    assert trained == set(fresh.lora_parameters()) != set()
    assert {p.dtype for p in fresh.lora_parameters().values()} == {torch.float32}


def test_the_reference_is_the_model_without_its_adapter(any_checkpoint):
    adapted, plain = any_checkpoint.adapted(), any_checkpoint.load()
    with adapted.reference():
        torch.testing.assert_close(our_images(adapted), our_images(plain))
    assert (our_images(adapted) - our_images(plain)).abs().max() > 1e-3


def test_a_saved_adapter_gives_the_same_images_in_the_backbone_and_in_a_plain_pipeline(
    any_checkpoint, tmp_path
):
    adapted = any_checkpoint.adapted()
    file = tmp_path / "adapter.safetensors"
    adapted.save_adapter(file)
    ours = our_images(adapted)
    loaded = any_checkpoint.load()
    loaded.load_adapter(file)
    torch.testing.assert_close(our_images(loaded), ours, atol=1e-5, rtol=1e-5)
    pipeline = any_checkpoint.pipeline()
    plain = their_images(adapted, pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 4)
    theirs = their_images(adapted, pipeline)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (theirs - plain).abs().max() > 1e-3


def test_a_bfloat16_network_samples_with_the_adapter_that_it_was_trained_with(checkpoint, tmp_path):
    trained = checkpoint.adapted(dtype=torch.bfloat16)
    file = tmp_path / "adapter.safetensors"
    trained.save_adapter(file)
    loaded = checkpoint.load(dtype=torch.bfloat16)
    loaded.load_adapter(file)
    assert {p.dtype for p in loaded.lora_parameters().values()} == {torch.float32}
    assert torch.equal(our_images(loaded), our_images(trained))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
def test_an_adapter_starts_equal_on_all_devices(checkpoint, device):
    adapters = []
    for place in ("cpu", device):
        backbone = checkpoint.load(device=place, dtype=torch.bfloat16)
        backbone.add_lora(4, 8, seeding.generator(0, "lora"))
        adapters.append({n: p.detach().cpu() for n, p in backbone.lora_parameters().items()})
    assert all(torch.equal(adapters[0][n], adapters[1][n]) for n in adapters[0])


@pytest.mark.parametrize("name", FOUND)
def test_a_folder_is_loaded_with_the_backbone_of_its_pipeline_class(name):
    checkpoint = checkpoint_of(name)
    assert type(loading.load(checkpoint.folder, **checkpoint.settings)) is checkpoint.backbone


def test_a_folder_that_no_backbone_can_load_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json: not found"):
        loading.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    message = "model_index.json: no backbone trains a 'OtherPipeline' .*FluxPipeline"
    with pytest.raises(ValueError, match=message):
        loading.load(tmp_path)


def test_each_word_of_the_embedded_captions_is_one_token_in_both_tokenizers():
    for tokenizer, length in ((text.clip_tokenizer(), 3), (text.t5_tokenizer(), 2)):
        tokens = {tuple(tokenizer(word).input_ids) for word in text.words()}
        assert {len(ids) for ids in tokens} == {length}
        assert len(tokens) == len(text.words())


@pytest.mark.parametrize("name", EMBEDDED)
def test_shipped_tokenizers_are_those_that_the_code_builds(name):
    components = checkpoint_of(name).load().pipeline.components
    t5 = components.get("tokenizer_3") or components["tokenizer_2"]
    for prompt in PROMPTS:
        assert components["tokenizer"](prompt).input_ids == text.clip_tokenizer()(prompt).input_ids
        assert t5(prompt).input_ids == text.t5_tokenizer()(prompt).input_ids


def test_cudnn_attention_with_its_wrong_gradients_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_large_batches_are_decoded_in_parts_with_equal_images_and_gradients(monkeypatch):
    backbone = checkpoint_of("shapes-flux").load()
    sizes: list[int] = []
    whole = backbone.pipeline.vae.decode

    def counted(latents: Tensor, **settings: bool) -> tuple[Tensor]:
        sizes.append(len(latents))
        return whole(latents, **settings)

    backbone.pipeline.vae.decode = counted
    x_0 = torch.randn(5, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    found = []
    for pixels in (base.DECODED_PIXELS, 2 * backbone.resolution**2, 1):
        monkeypatch.setattr(base, "DECODED_PIXELS", pixels)
        given = x_0.clone().requires_grad_()
        images = backbone.decode(given)
        found.append((images.detach(), *torch.autograd.grad(images.square().sum(), given)))
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    for parts in found[1:]:
        for own, expected in zip(parts, found[0], strict=True):
            assert (own - expected).norm() < 1e-5 * expected.norm()
