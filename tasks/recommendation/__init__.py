# SPDX-License-Identifier: Apache-2.0
"""Multi-task recommendation: HoME, its rivals, their data and their scores."""
