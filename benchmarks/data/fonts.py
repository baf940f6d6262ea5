"""Where the fonts are that characters are rendered from, and which packages they come from."""

from __future__ import annotations

from pathlib import Path

from matplotlib.font_manager import findSystemFonts

# Debian package -> files in it, one a design: serif, sans, brush, handwriting, pixels.
KANJI_FONTS = {
    "fonts-aoyagi-kouzan-t": "AoyagiKouzanT.ttf",
    "fonts-aoyagi-soseki": "aoyagi-soseki.ttf",
    "fonts-arphic-ukai": "ukai.ttc",
    "fonts-arphic-uming": "uming.ttc",
    "fonts-cns11643-kai": "TW-Kai-98_1.ttf",
    "fonts-cns11643-sung": "TW-Sung-98_1.ttf",
    "fonts-dejima-mincho": "dejima-mincho-r227.ttf",
    "fonts-dotgothic16": "DotGothic16-Regular.ttf",
    "fonts-hanazono": "HanaMinA.ttf",
    "fonts-ipafont-mincho": "ipam.ttf",
    "fonts-kiloji": "kiloji.ttf",
    "fonts-klee": "KleeOne-Regular.ttf",
    "fonts-konatu": "Konatu.ttf",
    "fonts-kouzan-mouhitsu": "kouzan-mouhitsu.ttf kouzan-mouhitsu-gyosho.ttf",
    "fonts-lxgw-wenkai": "LXGWWenKai-Regular.ttf",
    "fonts-morisawa-bizud-gothic": "BIZUDGothic-Bold.ttf",
    "fonts-morisawa-bizud-mincho": "BIZUDMincho-Regular.ttf",
    "fonts-motoya-l-maruberi": "MTLmr3m.ttf",
    "fonts-noto-cjk-extra": "NotoSansCJK-Black.ttc NotoSerifCJK-Light.ttc",
    "fonts-rampart": "RampartOne-Regular.ttf",
    "fonts-reggae": "ReggaeOne-Regular.ttf",
    "fonts-rocknroll": "RocknRollOne-Regular.ttf",
    "fonts-seto": "setofont.ttf",
    "fonts-smiley-sans": "SmileySans-Oblique.ttf",
    "fonts-stick": "Stick-Regular.ttf",
    "fonts-umeplus": "umeplus-gothic.ttf",
    "fonts-wqy-microhei": "wqy-microhei.ttc",
    "fonts-wqy-zenhei": "wqy-zenhei.ttc",
    "fonts-yozvox-yozfont-new-kana": "YOzRN_.ttf",
    "fonts-yusei-magic": "YuseiMagic-Regular.ttf",
}
HANGUL_FONTS = {
    "fonts-alee": "Bandal.ttf Bangwool.ttf Eunjin.ttf EunjinNakseo.ttf Guseul.ttf",
    "fonts-baekmuk": "batang.ttf dotum.ttf hline.ttf",
    "fonts-lexi-gulim": "LexiGulim.ttf",
    "fonts-lexi-saebom": "LexiSaebomR.ttf",
    "fonts-nanum": "NanumMyeongjo.ttf",
    "fonts-nanum-extra": "NanumBarunpenR.ttf NanumBrush.ttf NanumGothicExtraBold.ttf NanumPen.ttf NanumSquareRoundL.ttf",
    "fonts-noto-cjk-extra": "NotoSerifCJK-Light.ttc",
    "fonts-unfonts-core": "UnDinaru.ttf UnGungseo.ttf UnPilgi.ttf",
    "fonts-unfonts-extra": (
        "UnJamoBatang.ttf UnJamoNovel.ttf UnJamoSora.ttf UnPen.ttf UnPenheulim.ttf UnTaza.ttf UnVada.ttf UnYetgul.ttf"
    ),
    "fonts-woowa-bm": (
        "BMDOHYEON_ttf.ttf BMEULJIROTTF.ttf BMEuljirooraeorae.ttf BMHANNAAir_ttf.ttf BMHANNA_11yrs_ttf.ttf "
        "BMJUA_ttf.ttf BMKIRANGHAERANG-TTF.ttf BMYEONSUNG_ttf.ttf"
    ),
}


def packaged_fonts(name: str, packages: dict[str, str]) -> list[Path]:
    """The files of these packages where the system keeps its fonts, in the order of `packages`.

    Raises:
        ValueError: some are not there; has the line that installs them.
    """
    found = {path.name: path for path in sorted(map(Path, findSystemFonts()), reverse=True)}
    missing = [package for package, files in packages.items() if not found.keys() >= set(files.split())]
    if missing:
        raise ValueError(
            f"{name} is rendered from the fonts of {len(packages)} Debian packages, of which {len(missing)} are not here. "
            f"Run sudo {install_line(missing)}, or name a folder with fonts of your own: --data {name}:FOLDER"
        )
    return [found[file] for files in packages.values() for file in files.split()]


def install_line(packages: list[str]) -> str:
    """The command that installs Debian packages."""
    return f"apt-get install {' '.join(packages)}"


def fonts_in(folder: Path) -> list[Path]:
    """All fonts in a folder and those below it, in the order of their paths.

    Raises:
        ValueError: there are none, or there is no such folder.
    """
    fonts = sorted(map(Path, findSystemFonts([str(folder)])))
    if not fonts:
        raise ValueError(f"there are no fonts (.ttf, .otf or .ttc) in {folder}: name a folder that has some")
    return fonts
