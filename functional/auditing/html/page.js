// Draws the report that stands in the page.

{
  const data = JSON.parse(document.getElementById("data").textContent);
  drawHead(data);
  drawFindings(data);
  drawProofs(data);
  drawMesh(data);
  drawMemory(data);
  drawTraffic(data);
  drawTensors(data);
}
