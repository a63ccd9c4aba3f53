"""Images as a backbone takes them: their pixels, in rows of patches or in tiles, and the ids that stand for them.

This file travels to the Hub as remote code.
"""

import torch

from .chat_moca import IMAGE_PAD, VISION_END, VISION_START
from .images_moca import open_image, resize_pixels, rows_from_bytes

# The tokens that a backbone's tokenizer must have, by the layout of its pixels; the first stands for image patches.
IMAGE_TOKENS = {
    "rows": (IMAGE_PAD, VISION_START, VISION_END),
    "tiles": ("<image>", "<fake_token_around_image>", "<global-img>"),
}


class ImageInputsMixin:
    """The part of [`MoCaProcessor`] that looks at images."""

    def encode_images(self, images):
        """Return the pixels of decoded images as the backbone takes them.

        Args:
            images (`list[list[PIL.Image.Image]]`): RGB images of every row; at least one row has one.

        Returns:
            `dict`: `pixel_values` and `image_grid_thw` or `pixel_attention_mask`, as from calling the processor.
        """
        encode = self._rows_of_patches if self._layout == "rows" else self._tiles
        return encode(images, {})[0]

    def resize(self, image, exact=True):
        """Return a decoded image in the size in which it is cut into patches; only where [`MoCaProcessor.makes_bytes`].

        Args:
            image (`PIL.Image.Image`): RGB.
            exact (`bool`, defaults to `True`): see [`~modeling_moca.images_moca.resize_pixels`].

        Returns:
            `torch.ByteTensor` of shape `(height, width, 3)`.
        """
        # Here, since the module needs Pillow.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        size = self.image_processor.size
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        height, width = smart_resize(image.height, image.width, factor=self.patch_size * self.merge_size, **limits)
        return resize_pixels(image, height, width, self.image_processor.resample, exact)

    def encode_resized(self, images):
        """Return pixels as bytes, to be cut and normalised later by [`~modeling_moca.images_moca.rows_from_bytes`].

        Args:
            images (`list[list[torch.ByteTensor]]`): images of every row, from [`MoCaProcessor.resize`]; at least one.

        Returns:
            `dict`: `pixel_values` of shape `(num_bytes,)` and `image_grid_thw`.
        """
        flat = [image for row_images in images for image in row_images]
        grids = [(1, image.shape[0] // self.patch_size, image.shape[1] // self.patch_size) for image in flat]
        pixels = torch.cat([image.flatten() for image in flat])
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}

    @property
    def makes_bytes(self):
        """Whether resizing can be parted from cutting and normalising (`bool`): a stock Qwen-VL image processor."""
        processor = self.image_processor
        return (
            type(processor).__name__ == "Qwen2VLImageProcessorPil"
            and bool(processor.do_resize and processor.do_rescale and processor.do_normalize)
            and processor.rescale_factor == 1 / 255
        )

    def _encode_images(self, rows, images_kwargs):
        """Return the pixels of all images as the backbone takes them, and the ids that stand for each image."""
        opened, places = [], []
        for row, parts in enumerate(rows):
            opened.append([])
            for index, part in enumerate(part for part in parts if isinstance(part, tuple)):
                places.append(f"Row {row}, image {index}")
                if self.image_processor is None:
                    raise ValueError(f"{places[-1]}: images need Pillow (pip install pillow), which was not there.")
                opened[-1].append(open_image(part[0], places[-1]))
        if not places:
            return {}, []
        options = {key: value for key, value in images_kwargs.items() if key != "return_tensors"}
        encode = self._rows_of_patches if self._layout == "rows" else self._tiles
        try:
            return encode(opened, options)
        except ValueError:
            for place, image in zip(places, (image for images in opened for image in images)):
                try:
                    encode([[image]], options)
                except ValueError as error:
                    raise ValueError(f"{place} of {image.width}x{image.height} pixels is refused: {error}") from error
            raise

    def _rows_of_patches(self, images, options):
        if self.makes_bytes and not options:
            # The same numbers as from the stock class, several times faster: it copies every image in float64.
            encoded = self.encode_resized([[self.resize(image) for image in row_images] for row_images in images])
            encoded["pixel_values"] = rows_from_bytes(
                encoded["pixel_values"], encoded["image_grid_thw"], self.image_processor
            )
        else:
            flat = [image for row_images in images for image in row_images]
            encoded = self.image_processor(images=flat, return_tensors="pt", **options)
        grids = encoded["image_grid_thw"]  # [num_images, 3]
        num_tokens = (grids.prod(-1) // self.merge_size**2).tolist()
        inputs = {"pixel_values": encoded["pixel_values"], "image_grid_thw": grids}
        return inputs, [self._image_ids(number) for number in num_tokens]

    def _tiles(self, images, options):
        options = {**options, "return_row_col_info": True}
        encoded = self.image_processor(images=images, return_tensors="pt", **options)
        grids = [grid for rows, columns in zip(encoded["rows"], encoded["cols"]) for grid in zip(rows, columns)]
        # Of the width of a byte: as it comes, the mask is larger than the pixels of an image.
        mask = encoded["pixel_attention_mask"].bool()
        inputs = {"pixel_values": encoded["pixel_values"], "pixel_attention_mask": mask}
        return inputs, [self._image_ids(*grid) for grid in grids]

    def _image_ids(self, *grid):
        """Return the ids of one image: of its number of tokens, or of its rows and columns of tiles."""
        if self._layout == "rows":
            image, start, end = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["rows"])
            return [start, *[image] * grid[0], end]
        if grid not in self._image_ids_cache:
            # As the backbones were trained: tiles row by row, each named by its place, then the whole image.
            rows, columns = grid
            side = self.image_processor.max_image_size["longest_edge"] // self.patch_size // self.merge_size
            image, around, overview = IMAGE_TOKENS["tiles"]
            tile = image * side**2
            prompt = ""
            for row in range(1, rows + 1):
                prompt += "".join(f"{around}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
            prompt += ("\n" if prompt else "") + around + overview + tile + around
            self._image_ids_cache[grid] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return self._image_ids_cache[grid]

    def num_image_tokens(self, height, width):
        """Return how many tokens an image takes in a row, those around it included, without looking at its pixels.

        Args:
            height, width (`int`): size of the image in pixels.
        """
        return len(self._sized_image_ids(height, width))

    def _sized_image_ids(self, height, width):
        number = self.image_processor.get_number_of_image_patches(height, width, {})
        if self._layout == "rows":
            return self._image_ids(number // self.merge_size**2)
        return self._image_ids(*number[1:])


__all__ = ["IMAGE_TOKENS", "ImageInputsMixin"]
