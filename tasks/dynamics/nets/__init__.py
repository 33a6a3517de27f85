# SPDX-License-Identifier: Apache-2.0
"""Parts of MixER: banks of experts, gates over contexts, solvers, adaptation."""
