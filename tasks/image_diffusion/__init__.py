# SPDX-License-Identifier: Apache-2.0
"""Class-conditional image diffusion: ProMoE, its rivals, their data and the judgement of what they draw."""
