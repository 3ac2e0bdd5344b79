// Draws the report that stands in the page: each section by the function that is named after it.

{
  const data = JSON.parse(document.getElementById("data").textContent);
  drawHead(data);
  for (const { id } of document.querySelectorAll("main > section")) window[`draw${id[0].toUpperCase()}${id.slice(1)}`](data);
}
