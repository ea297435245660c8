"""stub"""


def write_plots(sweep, directory, truth):
    return []
