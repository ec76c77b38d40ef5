"""A transformer that nobody registered is known by its structure: python examples/own_model.py"""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import accel


class Block(torch.nn.Linear):
    def forward(self, hidden_states):  # takes and returns `hidden_states`: all that is asked
        return hidden_states + super().forward(hidden_states).tanh()


class MyTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(32, 32) for _ in range(6))  # a list of this name

    def forward(self, hidden_states, timestep):
        return (torch.nn.Sequential(*self.blocks)(hidden_states + timestep / 1000),)


class MyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self):
        latents = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(20)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.transformer(latents, t)[0], t, latents)[0]
        return latents


pipe = MyPipeline(MyTransformer().requires_grad_(False), FlowMatchEulerDiscreteScheduler())
untouched = pipe()
with accel.patched(pipe, accel.FirstBlockCache(threshold=0.1)) as patch:
    print("largest change:", float((pipe() - untouched).abs().max()), patch.report())
assert torch.equal(pipe(), untouched)
