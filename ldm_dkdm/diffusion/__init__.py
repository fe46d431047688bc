"""Pure maths of diffusion: schedules, one step, samplers, objectives."""
